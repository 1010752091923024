// What the run browser and the sample viewer share: elements, tabs, downloads, a line chart.
const SERIES = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9'];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [12, 4], [4, 2]];

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'class') node.className = value;
    else if (name === 'style') Object.assign(node.style, value);
    else if (/^(aria|data)-/.test(name)) node.setAttribute(name, value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter(child => child != null));
  return node;
}

function theme(el) {
  const style = getComputedStyle(el);
  const get = name => style.getPropertyValue(name).trim();
  return {
    ink: style.color,
    paper: get('--paper') || '#fff',
    line: get('--line') || '#ccc',
    dim: get('--dim') || '#777',
    accent: get('--accent') || '#0b6bb8',
    font: style.fontFamily,
  };
}

// Calls `redraw` when the notebook or the reader changes between light and dark.
function onTheme(redraw) {
  const media = matchMedia('(prefers-color-scheme: dark)');
  media.addEventListener('change', redraw);
  const watcher = new MutationObserver(redraw);
  for (const node of [document.documentElement, document.body])
    watcher.observe(node, {
      attributes: true,
      attributeFilter: ['data-jp-theme-light', 'data-jp-theme-name', 'data-theme', 'class'],
    });
  return () => {
    media.removeEventListener('change', redraw);
    watcher.disconnect();
  };
}

function save(name, blob) {
  const link = h('a', { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function csv(rows) {
  const cell = value => {
    const text = value == null ? '' : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return new Blob([rows.map(row => row.map(cell).join(',')).join('\n') + '\n'], {
    type: 'text/csv',
  });
}

function tabs(names, show) {
  const buttons = names.map(name =>
    h('button', { role: 'tab', type: 'button', onclick: () => choose(name) }, name),
  );
  const choose = name => {
    buttons.forEach((button, i) => {
      button.setAttribute('aria-selected', names[i] === name);
      button.tabIndex = names[i] === name ? 0 : -1;
    });
    show(name);
  };
  const bar = h('div', { class: 'vc-tabs', role: 'tablist' }, buttons);
  bar.addEventListener('keydown', event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = (buttons.indexOf(event.target) + step + names.length) % names.length;
    choose(names[at]);
    buttons[at].focus();
    event.preventDefault();
  });
  return { bar, choose };
}

function short(value) {
  if (value == null || Number.isNaN(value)) return '–';
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size && size < 1e-3 ? value.toExponential(1) : `${+value.toPrecision(4)}`;
}

function duration(seconds) {
  if (seconds == null) return '';
  const s = Math.round(seconds);
  const two = n => String(n).padStart(2, '0');
  if (s < 60) return `${s} s`;
  return s < 3600
    ? `${Math.floor(s / 60)}:${two(s % 60)} min`
    : `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)} h`;
}

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 2.5, 5, 10].map(f => f * power).find(s => s >= rough) || power;
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) found.push(t);
  return found;
}

// The exponential mean of a curve; null stays a gap.
function smoothed(ys, weight) {
  let mean = null;
  return ys.map(y => {
    if (y == null) return null;
    mean = mean == null ? y : weight * mean + (1 - weight) * y;
    return mean;
  });
}

// A chart on a canvas. `draw({lines, marks, x, y, log})`: lines of {name, slot, xs, ys}, marks of
// {x, name} (where a stage begins). Arrow keys move the reading line.
function chart(height, say) {
  const canvas = h('canvas', { tabindex: 0, role: 'img', style: { height: `${height}px` } });
  const box = h('div', { class: 'vc-plot' }, canvas);
  const pad = { left: 56, right: 16, top: 12, bottom: 40 };
  let given = null;
  let at = null;
  let scale = null;

  function paint() {
    const width = box.clientWidth;
    if (!given || !width) return;
    const ratio = devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const c = canvas.getContext('2d');
    c.scale(ratio, ratio);
    const look = theme(box);
    c.fillStyle = look.paper;
    c.fillRect(0, 0, width, height);
    c.font = `12px ${look.font}`;
    scale = scales(width);
    if (!scale) {
      c.fillStyle = look.dim;
      c.textAlign = 'center';
      c.fillText(given.empty || 'nothing to draw yet', width / 2, height / 2);
      return;
    }
    axes(c, look, width);
    for (const line of given.lines) trace(c, look, line);
    if (at != null) reading(c, look, width);
  }

  function scales(width) {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const line of given.lines)
      line.ys.forEach((y, i) => {
        if (y == null || line.xs[i] == null || (given.log && y <= 0)) return;
        const v = given.log ? Math.log10(y) : y;
        [x0, x1] = [Math.min(x0, line.xs[i]), Math.max(x1, line.xs[i])];
        [y0, y1] = [Math.min(y0, v), Math.max(y1, v)];
      });
    if (x0 === Infinity) return null;
    if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
    const room = (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 0.5;
    [y0, y1] = [y0 - room, y1 + room];
    const wide = width - pad.left - pad.right;
    const tall = height - pad.top - pad.bottom;
    return {
      x: x => pad.left + ((x - x0) / (x1 - x0)) * wide,
      y: y => pad.top + (1 - ((given.log ? Math.log10(y) : y) - y0) / (y1 - y0)) * tall,
      back: px => x0 + ((px - pad.left) / wide) * (x1 - x0),
      x0, x1, y0, y1,
    };
  }

  function axes(c, look, width) {
    c.strokeStyle = look.line;
    c.fillStyle = look.dim;
    c.lineWidth = 1;
    c.textAlign = 'right';
    c.textBaseline = 'middle';
    for (const t of ticks(scale.y0, scale.y1, 5)) {
      const y = Math.round(scale.y(given.log ? 10 ** t : t)) + 0.5;
      c.globalAlpha = 0.6;
      c.beginPath();
      c.moveTo(pad.left, y);
      c.lineTo(width - pad.right, y);
      c.stroke();
      c.globalAlpha = 1;
      c.fillText(short(given.log ? 10 ** t : t), pad.left - 7, y);
    }
    c.textAlign = 'center';
    c.textBaseline = 'top';
    for (const t of ticks(scale.x0, scale.x1, Math.max(2, width / 110)))
      c.fillText(short(t), scale.x(t), height - pad.bottom + 6);
    c.fillText(given.x, pad.left + (width - pad.left - pad.right) / 2, height - 15);
    c.textAlign = 'left';
    let free = -1;  // names of stages do not run into each other
    for (const mark of given.marks || []) {
      const x = Math.round(scale.x(mark.x)) + 0.5;
      c.setLineDash([2, 3]);
      c.strokeStyle = look.dim;
      c.beginPath();
      c.moveTo(x, pad.top);
      c.lineTo(x, height - pad.bottom);
      if (mark.x > scale.x0) c.stroke();
      c.setLineDash([]);
      if (x > free) {
        c.fillText(mark.name, x + 4, pad.top);
        free = x + 10 + c.measureText(mark.name).width;
      }
    }
  }

  function trace(c, look, line) {
    c.strokeStyle = line.slot == null ? look.accent : SERIES[line.slot % SERIES.length];
    c.setLineDash(line.pale ? [] : DASHES[(line.slot || 0) % DASHES.length]);
    c.globalAlpha = line.pale ? 0.25 : 1;
    c.lineWidth = line.pale ? 1 : 2;
    c.lineJoin = 'round';
    c.beginPath();
    let pen = false;
    line.ys.forEach((y, i) => {
      if (y == null || (given.log && y <= 0)) return void (pen = false);
      c[pen ? 'lineTo' : 'moveTo'](scale.x(line.xs[i]), scale.y(y));
      pen = true;
    });
    c.stroke();
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  // The nearest point of every line to the reading line.
  function read() {
    return given.lines
      .filter(line => !line.pale)
      .map(line => {
        let best = -1;
        line.xs.forEach((x, i) => {
          if (line.ys[i] == null) return;
          if (best < 0 || Math.abs(x - at) < Math.abs(line.xs[best] - at)) best = i;
        });
        return best < 0 ? null : { line, x: line.xs[best], y: line.ys[best] };
      })
      .filter(Boolean);
  }

  function reading(c, look) {
    c.strokeStyle = look.ink;
    c.globalAlpha = 0.5;
    c.beginPath();
    c.moveTo(scale.x(at), pad.top);
    c.lineTo(scale.x(at), height - pad.bottom);
    c.stroke();
    c.globalAlpha = 1;
    for (const { line, x, y } of read()) {
      c.fillStyle = line.slot == null ? look.accent : SERIES[line.slot % SERIES.length];
      c.strokeStyle = look.paper;
      c.lineWidth = 1.5;
      c.beginPath();
      c.arc(scale.x(x), scale.y(y), 4.5, 0, 7);
      c.fill();
      c.stroke();
    }
  }

  function move(x) {
    if (!scale) return;
    at = x == null ? null : Math.min(scale.x1, Math.max(scale.x0, x));
    paint();
    if (at == null) return say('');
    const values = read().map(({ line, y }) => `${line.name} ${short(y)}`);
    say(`${given.x} ${short(at)}: ${values.join(', ')}`);
  }

  canvas.addEventListener('pointermove', e => scale && move(scale.back(e.offsetX)));
  canvas.addEventListener('pointerleave', () => move(null));
  canvas.addEventListener('keydown', event => {
    const steps = { ArrowLeft: -0.01, ArrowRight: 0.01, PageUp: -0.1, PageDown: 0.1 };
    if (!scale || !(event.key in steps || ['Home', 'End', 'Escape'].includes(event.key))) return;
    event.preventDefault();
    if (event.key === 'Escape') return move(null);
    if (event.key === 'Home') return move(scale.x0);
    if (event.key === 'End') return move(scale.x1);
    move((at == null ? scale.x0 : at) + steps[event.key] * (scale.x1 - scale.x0));
  });
  const resized = new ResizeObserver(paint);
  resized.observe(box);
  return {
    box,
    draw(next) {
      given = next;
      canvas.setAttribute('aria-label', `${next.y} over ${next.x}, ${next.lines.length} curves`);
      paint();
    },
    paint,
    png: name => canvas.toBlob(blob => save(name, blob)),
    end: () => resized.disconnect(),
  };
}
