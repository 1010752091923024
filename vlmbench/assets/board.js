// A picture to point at: eight kinds of marker, drawn with one gesture each. Plain DOM, no library,
// no network.
// BOARD_CSS, the style sheet, is put in front of this file by vlmbench.demo.board.board_js.
// mountBoard(root, settings, host) -> { setImage, setMarks, message }
//   settings: { kinds: {kind: [preposition, noun]}, palette: {name: [r, g, b]}, anchor, hint }
//   host:     { marks(list), insert(text), open(file) }     a mark is { kind, numbers, color, alpha }
function mountBoard(root, settings, host) {
  const ICONS = {
    rectangle: '<rect x="4" y="5" width="16" height="14"/>',
    ellipse: '<ellipse cx="12" cy="12" rx="9" ry="7"/>',
    triangle: '<path d="M12 4 21 20H3z"/>',
    point: '<circle cx="12" cy="12" r="4" fill="currentColor"/>',
    scribble: '<path d="M3 15c3-12 6-9 6-3s3 8 6 1 3-7 6-5"/>',
    'mask contour': '<path d="M6 6c5-4 13-1 13 5s-3 9-8 8-9-9-5-13z" stroke-dasharray="3 2.4"/>',
    mask: '<path d="M6 6c5-4 13-1 13 5s-3 9-8 8-9-9-5-13z" fill="currentColor" fill-opacity=".45"/>',
    arrow: '<path d="M4 20 19 5M10 5h9v9"/>',
  };
  const HOW = {
    point: 'Click to set a point.',
    scribble: 'Drag a line over the thing.',
    arrow: 'Drag from anywhere to the thing: the arrow points where you let go.',
    mask: 'Drag around the thing: the outline is filled.',
    'mask contour': 'Drag around the thing.',
  };
  const el = (tag, cls, html) => {
    const e = document.createElement(tag);
    if (cls) e.className = cls;
    if (html) e.innerHTML = html;
    return e;
  };
  const button = (cls, text, title, click) => {
    const b = el('button', cls);
    b.type = 'button';
    b.textContent = text;
    b.title = title;
    b.setAttribute('aria-label', title);
    b.onclick = click;
    return b;
  };

  const kinds = Object.keys(settings.kinds),
    colors = Object.keys(settings.palette);
  let tool = kinds[0],
    color = colors[0],
    alpha = 128,
    marks = [],
    picture = null,
    size = [0, 0],
    path = null,
    scale = 1;

  const box = el('div', 'vp'),
    style = el('style');
  style.textContent = BOARD_CSS;
  const tools = el('div', 'vp-tools'),
    row = el('div', 'vp-row'),
    stage = el('div', 'vp-stage'),
    list = el('div', 'vp-marks'),
    note = el('div', 'vp-note');
  tools.setAttribute('role', 'toolbar');
  tools.setAttribute('aria-label', 'kind of marker');
  note.setAttribute('role', 'status');
  const canvas = el('canvas'),
    empty = el('div', 'vp-empty', '<b>Open a picture</b>Click here, or drop a file');
  canvas.setAttribute('aria-label', 'the picture: draw a marker on it');

  const toolButtons = kinds.map(k => {
    const b = button('', '', `mark with a ${k}`, () => {
      tool = k;
      pressed();
      say(HOW[k] || `Drag a ${k} around the thing.`);
    });
    b.dataset.kind = k;
    const short = k === 'mask contour' ? 'contour' : k;
    b.innerHTML = `<svg viewBox="0 0 24 24">${ICONS[k]}</svg><span>${short}</span>`;
    tools.append(b);
    return b;
  });
  const swatches = colors.map(c => {
    const b = button('vp-swatch', '', c, () => {
      color = c;
      pressed();
    });
    b.dataset.color = c;
    b.style.background = `rgb(${settings.palette[c]})`;
    row.append(b);
    return b;
  });
  const opacity = el('input');
  opacity.type = 'range';
  opacity.min = 32;
  opacity.max = 255;
  opacity.value = alpha;
  opacity.setAttribute('aria-label', 'opacity');
  opacity.oninput = () => {
    alpha = +opacity.value;
  };
  const label = el('label');
  label.append('opacity', opacity);
  const undo = button('vp-act', 'Undo', 'remove the last marker', () => change(marks.slice(0, -1)));
  const clear = button('vp-act', 'Clear', 'remove all markers', () => change([]));
  row.append(label, el('span', 'vp-space'), undo, clear);
  const pressed = () => {
    toolButtons.forEach(b => b.setAttribute('aria-pressed', b.dataset.kind === tool));
    swatches.forEach(b => b.setAttribute('aria-pressed', b.dataset.color === color));
  };

  function say(text, bad) {
    note.textContent = text || '';
    note.classList.toggle('vp-bad', !!bad);
  }
  const name = m => `${settings.kinds[m.kind][0]} the ${m.color} ${settings.kinds[m.kind][1]}`;

  function change(next, tell = true) {
    marks = next;
    undo.disabled = clear.disabled = !marks.length;
    list.replaceChildren(
      ...marks.map((m, i) => {
        const chip = el('span', 'vp-chip'),
          dot = el('span', 'vp-dot');
        dot.style.background = `rgb(${settings.palette[m.color]})`;
        const use = button('', '', 'put this marker into the question', () =>
          host.insert(`<region${i || ''}>`),
        );
        use.append(dot, name(m));
        chip.append(
          use,
          button('', '×', 'remove this marker', () => change(marks.filter((_, j) => j !== i))),
        );
        return chip;
      }),
    );
    paint();
    if (tell) host.marks(marks);
  }

  function fit() {
    if (!picture) return;
    const wide = Math.max(stage.clientWidth - 2, 120),
      high = settings.height || 440,
      dpr = window.devicePixelRatio || 1;
    scale = Math.min(wide / size[0], high / size[1]);
    const w = Math.max(1, Math.round(size[0] * scale)),
      h = Math.max(1, Math.round(size[1] * scale));
    canvas.style.width = w + 'px';
    canvas.style.height = h + 'px';
    canvas.width = w * dpr;
    canvas.height = h * dpr;
    paint();
  }

  function paint() {
    if (!picture) return;
    const g = canvas.getContext('2d'),
      s = canvas.width / size[0];
    g.setTransform(1, 0, 0, 1, 0, 0);
    g.imageSmoothingEnabled = s < 3;
    g.drawImage(picture, 0, 0, canvas.width, canvas.height);
    g.setTransform(s, 0, 0, s, 0, 0);
    const drawing = path && shape(path);
    for (const m of drawing ? [...marks, drawing] : marks) draw(g, m);
  }

  // the geometry of vlmbench.demo.chat.to_marker, so that the preview is what will be drawn
  function draw(g, m) {
    const u = Math.max(...size) / settings.anchor,
      v = m.numbers,
      stroke = k => Math.max(Math.floor(k * u), 1);
    const rgb = settings.palette[m.color];
    g.globalAlpha = m.alpha / 255;
    g.strokeStyle = g.fillStyle = `rgb(${rgb})`;
    g.lineJoin = g.lineCap = 'round';
    g.lineWidth = stroke(m.kind === 'scribble' ? 4 : 3);
    g.beginPath();
    const outline = () => {
      if (v.length === 4) g.rect(v[0], v[1], v[2] - v[0], v[3] - v[1]);
      else for (let i = 0; i < v.length; i += 2) g.lineTo(v[i], v[i + 1]);
      g.closePath();
    };
    if (m.kind === 'rectangle') {
      g.lineJoin = 'miter';
      outline();
      g.stroke();
    } else if (m.kind === 'ellipse') {
      g.ellipse(
        (v[0] + v[2]) / 2,
        (v[1] + v[3]) / 2,
        (v[2] - v[0]) / 2,
        (v[3] - v[1]) / 2,
        0,
        0,
        7,
      );
      g.stroke();
    } else if (m.kind === 'triangle') {
      g.moveTo((v[0] + v[2]) / 2, v[1]);
      g.lineTo(v[0], v[3]);
      g.lineTo(v[2], v[3]);
      g.closePath();
      g.stroke();
    } else if (m.kind === 'point') {
      g.arc(v[0], v[1], Math.max(8 * u, 1.5), 0, 7);
      g.fill();
    } else if (m.kind === 'scribble') {
      for (let i = 0; i < v.length; i += 2) g.lineTo(v[i], v[i + 1]);
      g.stroke();
    } else if (m.kind === 'mask') {
      outline();
      g.fill();
    } else if (m.kind === 'mask contour') {
      g.lineWidth = 2 * stroke(1) + 1;
      outline();
      g.stroke();
    } else if (m.kind === 'arrow') {
      const tip = [v[2], v[3]],
        length = Math.hypot(v[0] - v[2], v[1] - v[3]),
        a = Math.atan2(v[1] - v[3], v[0] - v[2]),
        h = Math.min(Math.max(0.25 * length, 8 * u), length);
      g.moveTo(v[0], v[1]);
      g.lineTo(...tip);
      g.stroke();
      g.beginPath();
      g.moveTo(...tip);
      for (const d of [1, -1])
        g.lineTo(
          tip[0] + h * Math.cos(a + (d * Math.PI) / 3),
          tip[1] + h * Math.sin(a + (d * Math.PI) / 3),
        );
      g.closePath();
      g.fill();
    }
    g.globalAlpha = 1;
  }

  // a gesture (list of places) as a mark, or null while it is too small to be one
  function shape(p) {
    const r = x => Math.round(x * 10) / 10,
      [a, b] = [p[0], p[p.length - 1]],
      m = (...n) => ({ kind: tool, numbers: n.map(r), color, alpha });
    if (tool === 'point') return m(...b);
    const far = Math.max(...p.map(q => Math.hypot(q[0] - a[0], q[1] - a[1]))) * scale > 6;
    if (tool === 'arrow') return far ? m(...a, ...b) : null;
    if (['scribble', 'mask', 'mask contour'].includes(tool)) {
      if (!far) return null;
      const step = Math.ceil(p.length / 300),
        q = p.filter((_, i) => i % step === 0 || i === p.length - 1);
      while (q.length < 3) q.splice(1, 0, [(q[0][0] + q[1][0]) / 2, (q[0][1] + q[1][1]) / 2]);
      return m(...q.flat());
    }
    const [l, t, w, h] = [
      Math.min(a[0], b[0]),
      Math.min(a[1], b[1]),
      Math.abs(a[0] - b[0]),
      Math.abs(a[1] - b[1]),
    ];
    return Math.min(w, h) * scale > 3 ? m(l, t, l + w, t + h) : null;
  }

  const place = e => {
    const r = canvas.getBoundingClientRect();
    return [
      Math.min(Math.max((e.clientX - r.left) / r.width, 0), 1) * size[0],
      Math.min(Math.max((e.clientY - r.top) / r.height, 0), 1) * size[1],
    ];
  };
  canvas.onpointerdown = e => {
    if (e.button) return;
    e.preventDefault();
    canvas.setPointerCapture(e.pointerId);
    path = [place(e)];
    paint();
  };
  canvas.onpointermove = e => {
    if (!path) return;
    const p = place(e),
      q = path[path.length - 1];
    if (Math.hypot(p[0] - q[0], p[1] - q[1]) * scale >= 2) path.push(p);
    paint();
  };
  canvas.onpointerup = e => {
    if (!path) return;
    path.push(place(e));
    const m = shape(path);
    path = null;
    if (m) {
      change([...marks, m]);
      say(settings.hint);
    } else {
      paint();
      say(HOW[tool] || `Drag a ${tool} around the thing: that was too small.`);
    }
  };
  canvas.onpointercancel = () => {
    path = null;
    paint();
  };
  const file = el('input');
  file.type = 'file';
  file.accept = 'image/*';
  file.hidden = true;
  file.onchange = () => {
    if (file.files[0]) host.open(file.files[0]);
    file.value = '';
  };
  empty.onclick = () => file.click();
  stage.ondragover = e => {
    e.preventDefault();
    stage.classList.add('vp-drop');
  };
  stage.ondragleave = () => stage.classList.remove('vp-drop');
  stage.ondrop = e => {
    e.preventDefault();
    stage.classList.remove('vp-drop');
    if (e.dataTransfer.files[0]) host.open(e.dataTransfer.files[0]);
  };

  stage.append(empty);
  box.append(tools, row, stage, note, list, file);
  root.replaceChildren(style, box);
  pressed();
  change([], false);
  new ResizeObserver(fit).observe(stage);
  return {
    message: say,
    choose() {
      file.click();
    },
    setMarks(next) {
      change(next || [], false);
    },
    setImage(src, width, height) {
      if (!src) {
        picture = null;
        stage.replaceChildren(empty);
        return;
      }
      const img = new Image();
      img.onload = () => {
        picture = img;
        size = [width, height];
        stage.replaceChildren(canvas);
        fit();
      };
      img.src = src;
    },
  };
}
