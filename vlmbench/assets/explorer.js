// The layer explorer: a heat map of scores, a region of layers, and the views that go with it.
// Plain DOM and SVG. `data` is what vlmbench.lab.explorer.explorer_data writes.
const LX_CIVIDIS = [
  [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 102, 112], [125, 124, 120],
  [155, 148, 119], [188, 175, 110], [222, 203, 95], [254, 232, 56],
];

function lxRgb(share) {
  const at = Math.min(1, Math.max(0, share)) * (LX_CIVIDIS.length - 1);
  const low = Math.min(LX_CIVIDIS.length - 2, Math.floor(at));
  const [a, b] = [LX_CIVIDIS[low], LX_CIVIDIS[low + 1]];
  return a.map((v, i) => Math.round(v + (b[i] - v) * (at - low)));
}
const lxColor = share => (Number.isFinite(share) ? `rgb(${lxRgb(share).join(',')})` : 'none');

// difference of two ranks, -1..1: blue, white, orange
function lxChange(difference) {
  if (!Number.isFinite(difference)) return 'none';
  const end = difference < 0 ? [33, 102, 172] : [179, 88, 6];
  const share = Math.min(1, Math.abs(difference));
  return `rgb(${end.map(v => Math.round(247 + (v - 247) * share)).join(',')})`;
}

function lxMake(tag, attributes = {}, ...children) {
  const svg = ['svg', 'g', 'rect', 'text', 'path', 'line', 'title'].includes(tag);
  const node = svg
    ? document.createElementNS('http://www.w3.org/2000/svg', tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const lxShort = value => {
  if (!Number.isFinite(value)) return '–';
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) {
    return value.toExponential(1).replace('e-', 'e−').replace('e+', 'e').replace(/^-/, '−');
  }
  return String(Number(value.toPrecision(3))).replace('-', '−');
};

// layers in the words of a recipe: as vlmbench.lab.layer_tables.region_variant writes them
function lxVariant(recipe, layers) {
  if (!layers.length) return '';
  if (recipe === 'visual_region') return `where=${JSON.stringify(layers)}`;
  const runs = [];
  for (const layer of layers) {
    const last = runs[runs.length - 1];
    if (last && last[last.length - 1] === layer - 1) last.push(layer);
    else runs.push([layer]);
  }
  return runs.some(run => run.length < 2) ? '' : `ranges=${JSON.stringify(runs)}`;
}

function lxSave(name, blob) {
  const url = URL.createObjectURL(blob);
  const link = lxMake('a', { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// rows of all models side by side: one entry a (metric, token set), `of[i]` the row of model i
function lxRows(models) {
  const rows = new Map();
  models.forEach((model, number) => {
    for (const row of model.rows) {
      const key = `${row.metric}|${row.set}`;
      if (!rows.has(key)) rows.set(key, { ...row, key, of: models.map(() => null) });
      rows.get(key).of[number] = row;
    }
  });
  return [...rows.values()];
}

function lxCsv(models) {
  const lines = ['model,metric,token_set,layer,value'];
  const quoted = text => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  for (const model of models) {
    for (const row of model.rows) {
      row.values.forEach((value, layer) =>
        lines.push([quoted(model.title), row.metric, row.set, layer, value].join(','))
      );
    }
  }
  return lines.join('\n') + '\n';
}

// the heat map; `state` is shared with the rest and read anew by every draw
function lxHeat(state, act) {
  const box = lxMake('div', { style: 'overflow-x:auto' });
  const row = 18, gap = 22, top = state.models.length > 1 ? 40 : 24;
  let label = 300, blocks = [], width = 0, shown = [];

  const place = event => {
    const area = box.firstChild.getBoundingClientRect();
    const [x, y] = [event.clientX - area.left, event.clientY - area.top];
    const block = blocks.find(b => x >= b.left - gap / 2 && x < b.right + gap / 2) || null;
    const layer = block
      ? Math.min(block.depth - 1, Math.max(0, Math.floor((x - block.left) / block.cell)))
      : null;
    const at = Math.floor((y - top) / row);
    return { layer, row: at >= 0 && at < shown.length ? shown[at].key : null };
  };

  const svg = lxMake('svg', {
    class: 'lx-heat',
    tabindex: 0,
    role: 'listbox',
    'aria-multiselectable': 'true',
    'aria-label': 'Layers. Arrows move, space selects, shift and arrows extend, escape clears.',
  });
  box.append(svg);
  let brush = null;
  svg.addEventListener('pointerdown', event => {
    const at = place(event);
    if (at.row) act.row(at.row);
    if (at.layer === null) return;
    svg.focus({ preventScroll: true });
    svg.setPointerCapture(event.pointerId);
    const before = new Set(state.region);
    if (event.shiftKey) return act.extend(at.layer);
    brush = { from: at.layer, before, adds: !before.has(at.layer) };
    act.sweep(brush, at.layer);
  });
  svg.addEventListener('pointermove', event => {
    const at = place(event);
    if (brush && at.layer !== null) return act.sweep(brush, at.layer);
    if (!brush && at.row && at.layer !== null) act.hover(at.row, at.layer);
  });
  for (const name of ['pointerup', 'pointercancel']) {
    svg.addEventListener(name, () => {
      if (brush) act.done();
      brush = null;
    });
  }
  svg.addEventListener('keydown', event => act.key(event, shown.map(r => r.key)));

  const header = (block, parts) => {
    const step = Math.ceil(20 / block.cell);
    for (let layer = 0; layer < block.depth; layer += 1) {
      const x = block.left + layer * block.cell;
      const on = state.region.includes(layer);
      const option = lxMake('g', {
        role: 'option',
        id: `${state.id}-${block.number}-${layer}`,
        'aria-selected': on,
        'aria-label': `layer ${layer}`,
      });
      const fill = on ? 'var(--lx-accent)' : 'var(--lx-soft)';
      const inner = Math.max(1, block.cell - 1);
      option.append(lxMake('rect', { x, y: top - 18, width: inner, height: 15, rx: 2, fill }));
      if (layer % step === 0 || on) {
        const kind = on ? 'lx-on' : 'lx-dim';
        const middle = x + (block.cell - 1) / 2;
        const at = { x: middle, y: top - 7, 'text-anchor': 'middle', class: kind };
        option.append(lxMake('text', at, String(layer)));
      }
      parts.push(option);
    }
  };
  const body = (block, parts) => {
    shown.forEach((entry, at) => {
      const mine = entry.of[block.number], first = entry.of[0];
      const nothing = Array(block.depth).fill('var(--lx-soft)'); // not measured
      let colors = mine ? mine[state.scale === 'robust' ? 'robust' : 'rank'].map(lxColor) : nothing;
      if (state.scale === 'change' && block.number) {
        const change = layer => lxChange(mine.rank[layer] - first.rank[layer]);
        colors = mine && first ? nothing.map((_, layer) => change(layer)) : nothing;
      }
      colors.forEach((fill, layer) => {
        const [x, y] = [block.left + layer * block.cell, top + at * row];
        const size = { x, y, width: Math.max(1, block.cell - 1), height: row - 1 };
        parts.push(lxMake('rect', { ...size, fill, 'data-at': `${at}:${layer}` }));
      });
    });
    for (const layer of state.region.filter(l => l < block.depth)) {
      const x = block.left + layer * block.cell - 1;
      const size = { x, y: top - 1, width: block.cell + 1, height: shown.length * row + 1 };
      const line = { fill: 'none', stroke: 'var(--lx-accent)', 'stroke-width': 2 };
      parts.push(lxMake('rect', { ...size, ...line }));
    }
    const at = shown.findIndex(entry => entry.key === state.row);
    if (state.layer < block.depth && at >= 0) {
      const [x, y] = [block.left + state.layer * block.cell, top + at * row];
      const size = { x: x - 0.5, y: y - 0.5, width: block.cell, height: row };
      for (const [stroke, wide] of [['#000', 4], ['#fff', 2]]) {
        parts.push(lxMake('rect', { ...size, fill: 'none', stroke, 'stroke-width': wide }));
      }
    }
  };
  const labels = parts => {
    shown.forEach((entry, at) => {
      const y = top + at * row + 12.5;
      if (entry.key === state.row) {
        const size = { x: 0, y: top + at * row, width: label - 6, height: row - 1, rx: 3 };
        parts.push(lxMake('rect', { ...size, fill: 'var(--lx-soft)' }));
      }
      if (at && shown[at - 1].group !== entry.group) {
        const line = { x1: 0, x2: width, y1: y - 13, y2: y - 13, stroke: 'var(--lx-dim)' };
        parts.push(lxMake('line', line));
      }
      parts.push(lxMake('text', { x: 4, y }, entry.title));
      const end = { x: label - 12, y, 'text-anchor': 'end', class: 'lx-dim' };
      if (label > 200) parts.push(lxMake('text', end, entry.set.replaceAll('_', ' ')));
      const only = entry.of.length === 1 ? entry.of[0] : null;
      if (only && width - blocks[0].right > 140) {
        const small = 1e-5 * Math.max(Math.abs(only.low), Math.abs(only.high));
        const ends = [only.low, only.middle, only.high].map(v => (Math.abs(v) < small ? 0 : v));
        const range = ends.map(lxShort).join(' · ');
        parts.push(lxMake('text', { x: blocks[0].right + 10, y, class: 'lx-dim' }, range));
      }
    });
  };

  const draw = () => {
    width = Math.max(330, box.clientWidth || 900);
    label = width < 560 ? 190 : 300; // a phone: the token set stands in the text below
    shown = state.rows.filter(act.visible);
    const depths = state.models.map(model => model.depth);
    const range = depths.length === 1 && width > 620 ? 165 : 4;
    const free = width - label - range - gap * (depths.length - 1);
    const cell = Math.min(36, Math.max(5, free / depths.reduce((a, b) => a + b, 0)));
    let left = label;
    blocks = depths.map((depth, number) => {
      const block = { number, depth, cell, left, right: left + depth * cell };
      left = block.right + gap;
      return block;
    });
    const parts = [];
    for (const block of blocks) {
      if (depths.length > 1) {
        const at = { x: block.left, y: 12, class: 'lx-name' };
        parts.push(lxMake('text', at, state.models[block.number].title));
      }
      header(block, parts);
    }
    const words = lxMake('text', { x: 4, y: top - 7, class: 'lx-dim' }, 'score');
    const sets = { x: label - 12, y: top - 7, 'text-anchor': 'end', class: 'lx-dim' };
    parts.push(words, lxMake('text', sets, label > 200 ? 'tokens  ·  layer →' : 'layer →'));
    if (depths.length === 1 && width - blocks[0].right > 140) {
      const at = { x: blocks[0].right + 10, y: top - 7, class: 'lx-dim' };
      parts.push(lxMake('text', at, 'low · median · high'));
    }
    labels(parts);
    blocks.forEach(block => body(block, parts));
    const height = top + shown.length * row + 4;
    svg.setAttribute('width', width);
    svg.setAttribute('height', height);
    svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    svg.setAttribute('aria-activedescendant', `${state.id}-0-${state.layer}`);
    svg.replaceChildren(...parts);
  };
  return { box, svg, draw };
}

// what is drawn in `svg`, with the colours it has now, as a PNG of twice its size
function lxPng(svg, done) {
  const copy = svg.cloneNode(true);
  const style = getComputedStyle(svg);
  const names = ['paper', 'soft', 'line', 'ink', 'dim', 'accent', 'on-accent'];
  const probe = lxMake('span');
  svg.parentNode.append(probe);
  const colors = names.map(name => {
    probe.style.color = `var(--lx-${name})`;
    return [name, getComputedStyle(probe).color];
  });
  probe.remove();
  const known = Object.fromEntries(colors);
  const rules = `svg{${colors.map(([name, color]) => `--lx-${name}:${color}`).join(';')}}
    text{font:11px ${style.fontFamily.replaceAll('"', "'")};fill:${known.ink}}
    .lx-dim{fill:${known.dim}} .lx-on{fill:${known['on-accent']};font-weight:650}
    .lx-name{font-weight:650}`;
  copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  copy.prepend(lxMake('rect', { width: '100%', height: '100%', fill: known.paper }));
  const sheet = document.createElementNS('http://www.w3.org/2000/svg', 'style');
  sheet.textContent = rules;
  copy.prepend(sheet);
  const picture = new Image();
  picture.onload = () => {
    const canvas = lxMake('canvas', { width: 2 * picture.width, height: 2 * picture.height });
    canvas.getContext('2d').drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(done, 'image/png');
  };
  const text = new XMLSerializer().serializeToString(copy);
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
}

// the row under the cursor: formula, reading, value
function lxAbout(state) {
  const card = lxMake('section', { class: 'lx-card', 'aria-live': 'polite' });
  const draw = () => {
    const entry = state.rows.find(row => row.key === state.row);
    if (!entry) return card.replaceChildren(lxMake('p', {}, 'No score fits these choices.'));
    const ways = { 1: 'More of it: more important.', '-1': 'Less of it: more important.' };
    const way = ways[entry.sign] || 'It describes and does not rank layers.';
    const values = entry.of.map((row, number) => {
      const model = state.models[number];
      const name = state.models.length > 1 ? `${model.title}: ` : '';
      if (!row || state.layer >= row.values.length) return `${name}not measured`;
      const value = row.values[state.layer];
      const rank = row.values.filter(other => other > value).length + 1;
      const unit = entry.unit ? ` ${entry.unit}` : '';
      return `${name}${lxShort(value)}${unit}, ${rank} of ${row.values.length} from the top`;
    });
    const bars = entry.of.filter(Boolean).map(row => lxBars(row.values, state));
    const same = entry.of.find(Boolean).stands;
    card.replaceChildren(
      lxMake('h4', {}, entry.title),
      lxMake('p', { class: 'lx-dim' }, `over ${entry.setWords}`),
      lxMake('code', { class: 'lx-formula' }, entry.formula),
      lxMake('p', {}, `${entry.reading} ${way}`),
      ...bars,
      lxMake('p', {}, `Layer ${state.layer}: ${values.join('; ')}`),
      same.length ? lxMake('p', { class: 'lx-dim' }, `Says the same: ${same.join(', ')}`) : ''
    );
  };
  return { card, draw };
}

function lxBars(values, state) {
  const [width, height] = [290, 44];
  const low = Math.min(0, ...values), high = Math.max(0, ...values), each = width / values.length;
  const y = value => height - 2 - ((value - low) / (high - low || 1)) * (height - 4);
  const svg = lxMake('svg', { width: '100%', viewBox: `0 0 ${width} ${height}`, role: 'img' });
  svg.setAttribute('aria-label', 'values on their own scale, one bar a layer');
  values.forEach((value, layer) => {
    const [top, bottom] = [Math.min(y(value), y(0)), Math.max(y(value), y(0))];
    const here = layer === state.layer, on = state.region.includes(layer);
    const fill = on ? 'var(--lx-accent)' : here ? 'var(--lx-ink)' : 'var(--lx-dim)';
    const size = { x: layer * each, y: top, width: Math.max(1, each - 1.5) };
    svg.append(lxMake('rect', { ...size, height: Math.max(1, bottom - top), fill }));
  });
  return svg;
}

// the region: which layers, the variant, its cost, a run
function lxRegion(state, act, on) {
  const chips = lxMake('div', { class: 'lx-chips' });
  const size = lxMake('span', { class: 'lx-dim' });
  const many = lxMake('input', { type: 'number', min: 1, value: state.share, 'aria-label': 'how many layers' });
  const button = (text, press, kind) =>
    lxMake('button', { type: 'button', class: kind || '', onclick: press }, text);
  const top = button('Top by this score', () => act.top(Number(many.value)));
  const stored = button('As the run chose', () => act.set(state.models[0].region));
  stored.title = `the run chose ${state.models[0].source}`;
  const choice = (label, names, value, press) => {
    const list = lxMake('select', { onchange: () => press(list.value) });
    names.forEach(name => list.append(lxMake('option', { value: name }, name)));
    list.value = value;
    return { list, line: lxMake('label', {}, label, list) };
  };
  const recipe = choice('Recipe', state.recipes.map(r => r.name), state.recipe, name => {
    state.recipe = name;
    on.recipe(name);
    act.draw();
  });
  const scale = choice('Scale', state.scales, state.chosen, name => on.scale(name));
  const what = lxMake('p', { class: 'lx-dim' });
  const variant = lxMake('code', { 'data-part': 'variant' });
  const copy = button('Copy', () => {
    const done = () => (copy.textContent = 'Copied');
    navigator.clipboard.writeText(variant.textContent).then(done, () => {
      getSelection().selectAllChildren(variant);
    });
    setTimeout(() => (copy.textContent = 'Copy'), 1500);
  });
  const cost = lxMake('table', { 'data-part': 'cost' });
  const note = lxMake('p', { 'data-part': 'note', role: 'status' });
  const go = button('Start the run', () => on.start(), 'lx-go');
  const begun = lxMake('p', { 'data-part': 'started', role: 'status' });
  const live = state.live
    ? [cost, note, lxMake('div', { class: 'lx-line' }, go), begun]
    : [lxMake('p', { class: 'lx-dim' }, 'In a notebook, its cost and a run are one click from here.')];
  const card = lxMake(
    'section',
    { class: 'lx-card' },
    lxMake('h4', {}, 'Region'),
    chips,
    lxMake('div', { class: 'lx-line' }, size),
    lxMake('div', { class: 'lx-line' }, many, top, stored, button('Clear', () => act.set([]))),
    lxMake('p', { class: 'lx-dim' }, `The run chose ${state.models[0].source}.`),
    lxMake('div', { class: 'lx-line' }, recipe.line, state.scales.length ? scale.line : ''),
    what,
    lxMake('div', { class: 'lx-line' }, variant, copy),
    ...live
  );
  const draw = () => {
    const layers = state.region, depth = state.models[0].depth;
    chips.replaceChildren(...layers.map(layer => lxMake('span', {}, String(layer))));
    const share = Math.round((100 * layers.length) / depth);
    size.textContent = layers.length
      ? `${layers.length} of ${depth} layers (${share}%)`
      : 'Click or brush layers; or arrows and space.';
    const text = state.live ? state.variant : lxVariant(state.recipe, layers);
    variant.textContent = text || '–';
    copy.disabled = go.disabled = !text || state.busy;
    what.textContent = `${state.recipe} ${state.recipes.find(r => r.name === state.recipe).what}.`;
    recipe.list.value = state.recipe;
    scale.list.value = state.chosen;
    cost.replaceChildren();
    if (state.cost.length) {
      const heads = Object.keys(state.cost[0]);
      cost.append(lxMake('tr', {}, ...heads.map(head => lxMake('th', {}, head))));
      for (const line of state.cost) {
        cost.append(lxMake('tr', {}, ...heads.map(head => lxMake('td', {}, line[head]))));
      }
    }
    note.textContent = state.note;
    begun.replaceChildren();
    if (state.started.folder) {
      begun.append(`${state.started.status}: `, lxMake('code', {}, state.started.folder));
    }
  };
  return { card, draw };
}

// one line a sample: how far each layer's own prediction is from the last layer's
function lxTrajectory(model, state) {
  const names = Object.keys(model.curves);
  if (!names.length) return null;
  const list = lxMake('select', { 'aria-label': 'which trajectory', onchange: () => draw() });
  names.forEach(name => list.append(lxMake('option', { value: name }, model.curves[name].label)));
  const holder = lxMake('div');
  const draw = () => {
    const { lines, median } = model.curves[list.value];
    const tops = state.models.map(one => (one.curves[list.value] || { top: 0 }).top);
    const top = Math.max(...tops); // two checkpoints on one scale
    const [width, height, left, foot] = [300, 230, 38, 36];
    const x = layer => left + 2 + ((layer + 0.5) / model.depth) * (width - left - 6);
    const y = value => 6 + (1 - Math.min(1, value / top)) * (height - foot - 10);
    const svg = lxMake('svg', { width: '100%', viewBox: `0 0 ${width} ${height}`, role: 'img' });
    svg.style.maxWidth = '360px';
    svg.setAttribute('aria-label', 'prediction trajectories, one line a sample, the median bold');
    const half = (x(1) - x(0)) / 2;
    const end = { y: 4, height: height - foot - 2 };
    for (const layer of state.region.filter(l => l < model.depth)) {
      const size = { x: x(layer) - half, width: 2 * half, ...end };
      svg.append(lxMake('rect', { ...size, fill: 'var(--lx-accent)', opacity: 0.22 }));
    }
    const path = line => line.map((v, i) => `${i ? 'L' : 'M'}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join('');
    const faint = Math.min(0.6, 12 / lines.length);
    for (const line of lines) {
      const look = { fill: 'none', stroke: 'var(--lx-dim)', opacity: faint };
      svg.append(lxMake('path', { d: path(line), ...look }));
    }
    svg.append(lxMake('path', { d: path(median), fill: 'none', stroke: 'var(--lx-ink)', 'stroke-width': 2.4 }));
    if (state.layer < model.depth) {
      const at = { x1: x(state.layer), x2: x(state.layer), y1: 4, y2: height - foot };
      svg.append(lxMake('line', { ...at, stroke: 'var(--lx-accent)', 'stroke-width': 1.5 }));
    }
    for (const value of [0, top / 2, top]) {
      const at = { x: left - 2, y: y(value) + 4, 'text-anchor': 'end', class: 'lx-dim' };
      svg.append(lxMake('text', at, lxShort(value)));
    }
    const step = Math.ceil(model.depth / 10);
    for (let layer = 0; layer < model.depth; layer += step) {
      const at = { x: x(layer), y: height - 20, 'text-anchor': 'middle', class: 'lx-dim' };
      svg.append(lxMake('text', at, String(layer)));
    }
    const words = { x: (left + width) / 2, y: height - 4, 'text-anchor': 'middle', class: 'lx-dim' };
    svg.append(lxMake('text', words, 'layer; KL to the last, in nats; median bold'));
    holder.replaceChildren(svg);
  };
  return { title: 'Prediction trajectory', nodes: [lxMake('div', { class: 'lx-line' }, list), holder], draw };
}

// CKA of all pairs of states, by rank of the pair
function lxCka(model, state) {
  const names = Object.keys(model.cka);
  if (!names.length) return null;
  const list = lxMake('select', { 'aria-label': 'which tokens', onchange: () => draw() });
  names.forEach(name => list.append(lxMake('option', { value: name }, name.replaceAll('_', ' '))));
  const holder = lxMake('div');
  const said = lxMake('p', { class: 'lx-dim' }, 'Point at a pair of states.');
  const draw = () => {
    const { values, ranks } = model.cka[list.value];
    const states = values.length, [size, left] = [250, 24], each = size / states;
    const svg = lxMake('svg', {
      width: '100%',
      style: 'max-width:300px',
      viewBox: `0 0 ${size + left + 8} ${size + 34}`,
      role: 'img',
      'aria-label': 'CKA between all states, brighter is more alike',
    });
    const y = b => 4 + (states - 1 - b) * each;
    values.forEach((row, a) =>
      row.forEach((value, b) => {
        const place = { x: left + a * each, y: y(b), width: each + 0.3, height: each + 0.3 };
        const fill = lxColor(ranks[a][b]);
        const tell = () => (said.textContent = `states ${a} and ${b}: CKA ${lxShort(value)}`);
        svg.append(lxMake('rect', { ...place, fill, onpointerenter: tell }));
      })
    );
    for (const layer of state.region.filter(l => l < model.depth)) {
      // layer l leads from state l to state l + 1
      const place = { x: left + layer * each, y: y(layer + 1), width: 2 * each, height: 2 * each };
      const look = { fill: 'none', stroke: 'var(--lx-accent)', 'stroke-width': 2 };
      svg.append(lxMake('rect', { ...place, ...look }));
    }
    const step = Math.ceil(states / 8);
    for (let at = 0; at < states; at += step) {
      const middle = { 'text-anchor': 'middle', class: 'lx-dim' };
      svg.append(lxMake('text', { x: left + (at + 0.5) * each, y: size + 17, ...middle }, String(at)));
      svg.append(lxMake('text', { x: left - 11, y: y(at) + each / 2 + 4, ...middle }, String(at)));
    }
    const words = { x: left + size / 2, y: size + 31, 'text-anchor': 'middle', class: 'lx-dim' };
    svg.append(lxMake('text', words, 'state (0: embedding); colour by rank of the pair'));
    holder.replaceChildren(svg);
  };
  return { title: 'CKA of the states', nodes: [lxMake('div', { class: 'lx-line' }, list), holder, said], draw };
}

// where a layer and head look on the picture, and how much of their attention goes there
function lxAttention(model, state, act) {
  if (!model.seen.length) return null;
  const first = lxMake('select', { 'aria-label': 'sample', onchange: () => draw() });
  model.seen.forEach((one, at) => first.append(lxMake('option', { value: at }, `sample ${at + 1}`)));
  const head = lxMake('select', { 'aria-label': 'head', onchange: () => draw() });
  const heads = model.seen[0].tops[0].length;
  head.append(lxMake('option', { value: -1 }, 'mean of heads'));
  for (let at = 0; at < heads; at += 1) head.append(lxMake('option', { value: at }, `head ${at}`));
  const canvas = lxMake('canvas', { class: 'lx-picture', role: 'img' });
  const matrix = lxMake('div'), said = lxMake('p', { 'data-part': 'looks' }), asked = lxMake('p', { class: 'lx-dim' });
  const pictures = model.seen.map(one => {
    const picture = new Image();
    picture.onload = () => draw();
    picture.src = one.picture;
    return picture;
  });
  const bytes = model.seen.map(one => Uint8Array.from(atob(one.maps), c => c.charCodeAt(0)));
  // attention [image tokens] of one layer and head, or the mean over heads
  const read = (sample, layer, which) => {
    const one = model.seen[sample], tokens = bytes[sample].length / (one.tops.length * heads);
    const chosen = which < 0 ? [...Array(heads).keys()] : [which];
    const out = new Float64Array(tokens);
    for (const h of chosen) {
      const start = (layer * heads + h) * tokens, top = one.tops[layer][h] / 255 / chosen.length;
      for (let t = 0; t < tokens; t += 1) out[t] += bytes[sample][start + t] * top;
    }
    return out;
  };
  const total = values => values.reduce((a, b) => a + b, 0);
  const paint = (sample, values) => {
    const picture = pictures[sample], grid = model.seen[sample].grid;
    if (!picture.complete || !picture.width) return;
    canvas.width = picture.width;
    canvas.height = picture.height;
    const pen = canvas.getContext('2d');
    pen.filter = 'grayscale(0.6) brightness(0.85)';
    pen.drawImage(picture, 0, 0);
    pen.filter = 'none';
    if (!grid) return;
    const [rows, columns] = grid, top = Math.max(...values) || 1;
    for (let at = 0; at < values.length; at += 1) {
      pen.fillStyle = `rgba(254,232,56,${(0.8 * values[at]) / top})`;
      const [w, h] = [canvas.width / columns, canvas.height / rows];
      pen.fillRect((at % columns) * w, Math.floor(at / columns) * h, w, h);
    }
  };
  const draw = () => {
    const sample = Number(first.value), which = Number(head.value), one = model.seen[sample];
    const layer = Math.min(state.layer, model.depth - 1);
    const values = read(sample, layer, which);
    paint(sample, values);
    const who = which < 0 ? 'the heads' : `head ${which}`;
    const share = (100 * total(values)).toFixed(1);
    said.textContent = `Layer ${layer}: ${share}% of the attention of ${who} is on the picture.`;
    canvas.setAttribute('aria-label', said.textContent);
    const fit = one.grid ? '' : ' Its image tokens form no grid, so they are not laid out.';
    asked.textContent = `“${one.question.replace(/<image>/g, '').trim()}” “${one.answer}”.${fit}`;
    const [width, row] = [200, Math.max(4, Math.min(14, 190 / model.depth))], each = width / heads;
    const svg = lxMake('svg', {
      width: '100%',
      style: 'max-width:240px',
      viewBox: `0 0 ${width + 26} ${model.depth * row + 20}`,
      role: 'img',
      'aria-label': 'share of attention on the picture by layer and head',
    });
    const shares = one.tops.map((_, l) => [...Array(heads).keys()].map(h => total(read(sample, l, h))));
    const top = Math.max(...shares.flat()) || 1;
    shares.forEach((line, l) => {
      line.forEach((value, h) => {
        const place = { x: 24 + h * each, y: l * row, width: each - 0.6, height: row - 0.6 };
        const press = () => {
          head.value = h;
          act.layer(l);
        };
        const cell = lxMake('rect', { ...place, fill: lxColor(value / top), onclick: press });
        cell.append(lxMake('title', {}, `layer ${l}, head ${h}: ${(100 * value).toFixed(1)}%`));
        if ((which < 0 || which === h) && l === layer) {
          cell.setAttribute('stroke', 'var(--lx-accent)');
          cell.setAttribute('stroke-width', 2);
        }
        svg.append(cell);
      });
      if (l % Math.ceil(14 / row) === 0) {
        const at = { x: 18, y: l * row + row / 2 + 4, 'text-anchor': 'end', class: 'lx-dim' };
        svg.append(lxMake('text', at, String(l)));
      }
    });
    const words = { x: 24, y: model.depth * row + 14, class: 'lx-dim' };
    svg.append(lxMake('text', words, `heads →, layers ↓; at most ${(100 * top).toFixed(0)}%`));
    matrix.replaceChildren(svg);
  };
  const nodes = [
    lxMake('div', { class: 'lx-line' }, first, head),
    lxMake('div', { class: 'lx-pair' }, canvas, matrix),
    said,
    asked,
  ];
  return { title: 'Attention on the picture', nodes, draw };
}

// the choices above the heat map: how rows are coloured, which of them show
function lxTools(state, draw, save) {
  const pick = (label, options, name) => {
    const list = lxMake('select', { 'data-part': name, onchange: () => draw((state[name] = list.value)) });
    options.forEach(([value, words]) => list.append(lxMake('option', { value }, words)));
    list.value = state[name];
    return lxMake('label', {}, label, list);
  };
  const once = values => [...new Set(values)].map(v => [v, v.replaceAll('_', ' ')]);
  const sets = [['', 'every set'], ...once(state.rows.map(r => r.set))];
  const groups = [['main', 'the main ones'], ['', 'all of them'], ...once(state.rows.map(r => r.group))];
  const trimmed = lxMake('input', { type: 'checkbox', onchange: () => draw((state.trimmed = trimmed.checked)) });
  const colors = [['rank', 'by rank in its row'], ['robust', 'by distance from the median']];
  if (state.models.length > 1) colors.push(['change', 'second: change of rank']);
  const ramp = color => {
    const steps = [...Array(9).keys()].map(i => color(i / 8));
    const style = `background:linear-gradient(90deg,${steps.join(',')})`;
    return lxMake('span', { class: 'lx-legend', style });
  };
  return lxMake(
    'div',
    { class: 'lx-tools' },
    pick('Scores', groups, 'group'),
    pick('Tokens', sets, 'set'),
    pick('Colour', colors, 'scale'),
    state.rows.some(r => r.trimmed) ? lxMake('label', {}, trimmed, 'without massive activations') : '',
    lxMake('span', { class: 'lx-dim' }, 'low'),
    ramp(lxColor),
    lxMake('span', { class: 'lx-dim' }, 'high'),
    ...(state.models.length > 1
      ? [ramp(share => lxChange(2 * share - 1)), lxMake('span', { class: 'lx-dim' }, 'change')]
      : []),
    lxMake('button', { type: 'button', 'data-part': 'png', onclick: save.png }, 'PNG'),
    lxMake('button', { type: 'button', 'data-part': 'csv', onclick: save.csv }, 'CSV')
  );
}

function mountExplorer(el, data, on) {
  const rows = lxRows(data.models);
  const state = {
    ...data,
    id: `lx${Math.random().toString(36).slice(2, 8)}`,
    rows,
    row: rows.length ? rows[0].key : null,
    layer: 0,
    anchor: 0,
    region: [...data.region],
    chosen: data.scale,
    scale: 'rank',
    group: rows.some(row => row.main && !row.trimmed) ? 'main' : '',
    set: '',
    trimmed: false,
    variant: '',
    cost: [],
    note: '',
    started: {},
    busy: false,
  };
  const deepest = Math.max(...data.models.map(model => model.depth));
  const depth = data.models[0].depth;
  const parts = [];
  const draw = () => {
    const shown = state.rows.filter(act.visible);
    if (!shown.some(row => row.key === state.row)) state.row = shown.length ? shown[0].key : null;
    parts.forEach(part => part.draw());
  };
  const sorted = layers => [...new Set(layers)].filter(l => l < depth).sort((a, b) => a - b);
  const between = (a, b) => [...Array(Math.abs(a - b) + 1).keys()].map(i => Math.min(a, b) + i);
  let waiting = null;
  const soon = () => {
    waiting = waiting || requestAnimationFrame(() => draw((waiting = null)));
  };
  const act = {
    draw,
    visible: row =>
      (state.group === 'main' ? row.main : !state.group || row.group === state.group) &&
      (!state.set || row.set === state.set) &&
      (state.trimmed || !row.trimmed),
    row: key => (state.row = key),
    layer: layer => draw((state.layer = layer)),
    hover: (key, layer) => {
      if (key === state.row && layer === state.layer) return;
      [state.row, state.layer] = [key, layer];
      soon();
    },
    set: layers => {
      state.region = sorted(layers);
      act.done();
      draw();
    },
    done: () => on.region(state.region),
    extend: layer => {
      state.layer = layer;
      act.set([...state.region, ...between(state.anchor, layer)]);
    },
    sweep: (brush, layer) => {
      const range = between(brush.from, layer);
      const after = new Set(brush.before);
      range.forEach(l => (brush.adds ? after.add(l) : after.delete(l)));
      [state.region, state.layer, state.anchor] = [sorted(after), layer, brush.from];
      soon();
    },
    top: many => {
      const entry = state.rows.find(row => row.key === state.row);
      const mine = entry && entry.of[0];
      if (!mine || !(many >= 1)) return;
      const way = entry.sign < 0 ? -1 : 1;
      const order = mine.values.map((value, layer) => [way * value, layer]);
      order.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
      act.set(order.slice(0, many).map(pair => pair[1]));
    },
    key: (event, keys) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -deepest, End: deepest }[event.key];
      const down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (step !== undefined) {
        state.layer = Math.min(deepest - 1, Math.max(0, state.layer + step));
        if (event.shiftKey) act.extend(state.layer);
        else state.anchor = state.layer;
      } else if (down !== undefined) {
        const at = keys.indexOf(state.row) + down;
        state.row = keys[Math.min(keys.length - 1, Math.max(0, at))];
      } else if (event.key === ' ') {
        const has = state.region.includes(state.layer);
        state.anchor = state.layer;
        if (has) act.set(state.region.filter(l => l !== state.layer));
        else act.set([...state.region, state.layer]);
      } else if (event.key === 'Escape') {
        act.set([]);
      } else if (event.key === 'a' && (event.ctrlKey || event.metaKey)) {
        act.set(between(0, depth - 1));
      } else {
        return;
      }
      event.preventDefault();
      event.stopPropagation(); // JupyterLab has keys of its own
      draw();
    },
  };
  const heat = lxHeat(state, act);
  const about = lxAbout(state);
  const region = lxRegion(state, act, on);
  const save = {
    csv: () => lxSave('layers.csv', new Blob([lxCsv(state.models)], { type: 'text/csv' })),
    png: () => lxPng(heat.svg, blob => lxSave('layers.png', blob)),
  };
  const several = state.models.length > 1 ? ' lx-two' : '';
  const views = lxMake('div', { class: `lx-views${several}` });
  for (const make of [lxTrajectory, lxCka, lxAttention]) {
    for (const model of state.models) {
      const view = make(model, state, act);
      if (!view) continue;
      const whose = state.models.length > 1 ? ` · ${model.title}` : '';
      const title = lxMake('h4', {}, view.title + whose);
      views.append(lxMake('section', { class: 'lx-card' }, title, ...view.nodes));
      parts.push(view);
    }
  }
  if (!views.children.length) {
    const words = 'This run kept no trajectories, no CKA of all states and no attention on pictures.';
    views.append(lxMake('p', { class: 'lx-dim' }, words));
  }
  parts.push(heat, about, region);
  const titles = state.models.map(model => model.title).join('  |  ');
  const facts = state.models.map(m => `${m.depth} layers${m.samples ? `, ${m.samples}` : ''}`);
  const root = lxMake(
    'div',
    { class: 'lx', role: 'region', 'aria-label': `layer explorer: ${titles}` },
    lxMake('style', {}, EXPLORER_CSS),
    lxMake(
      'div',
      { class: 'lx-head' },
      lxMake('div', {}, lxMake('span', { class: 'lx-title' }, titles), ' ', lxMake('span', { class: 'lx-dim' }, facts.join(' | '))),
      lxTools(state, draw, save)
    ),
    lxMake(
      'div',
      { class: 'lx-main' },
      lxMake('div', {}, lxMake('section', { class: 'lx-card' }, heat.box), views),
      lxMake('div', { class: 'lx-side' }, about.card, region.card)
    )
  );
  el.append(root);
  const watch = new ResizeObserver(soon);
  watch.observe(heat.box);
  draw();
  return {
    state,
    tell: (name, value) => {
      if (name === 'region') state.region = [...value];
      else if (name === 'scale') state.chosen = value;
      else state[name] = value;
      if (name === 'started') state.busy = ['starting', 'running'].includes(value.status);
      draw();
    },
    close: () => watch.disconnect(),
  };
}
