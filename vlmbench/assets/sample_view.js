// The sample and mask viewer (vlmbench.lab.sample_view): one row of a batch, linked: a token, its
// patch in the picture, and its line in the attention mask.
const SIDE = 328; // of the mask on the page, in px
const MOST_SIDE = 190; // of a picture
const VISIBLE = piece => piece.replaceAll('Ġ', '␣').replaceAll('▁', '␣').replaceAll('Ċ', '⏎');

function mountViewer(el, model) {
  const settings = model.get('settings');
  let row = model.get('rows')[0];
  let at = 0; // the token that is looked from
  let spread = new Set(); // documents' pictures whose tokens are all shown
  const note = h('div', { class: 'vc-note', role: 'status', 'aria-live': 'polite' });
  const tell = (text, bad = false) => {
    note.textContent = text;
    note.dataset.bad = bad;
  };

  // ---- which row
  const ask = place => {
    tell('…');
    model.send({ want: 'row', ...place });
  };
  const select = (label, names, change) => h('select', { 'aria-label': label, onchange: change },
    names.map(name => h('option', { value: name }, name)));
  const recipe = select('Recipe', settings.recipes, () => ask({ recipe: recipe.value }));
  const stage = select('Stage', [], () => ask({ recipe: recipe.value, stage: stage.value }));
  const step = name => h('button', { type: 'button', 'aria-label': `${name < 0 ? 'previous' : 'next'} row`,
    onclick: () => move(name) }, name < 0 ? '◀ row' : 'row ▶');
  const [back, on] = [step(-1), step(1)];
  const where = h('span', { class: 'vc-dim' });
  const under = select('Under each token', ['id', 'position', 'document'], () => {
    showTokens();
    look(at);
  });
  function move(by) {
    let [number, next] = [row.number, row.row + by];
    if (next < 0) [number, next] = [number - 1, -1];
    else if (next >= row.rows) [number, next] = [number + 1, 0];
    if (number >= 0) ask({ recipe: recipe.value, stage: stage.value, number, row: next });
  }
  const bar = h('div', { class: 'vc-bar' }, recipe, stage, back, on, where,
    h('span', { class: 'vc-fill' }),
    h('button', { type: 'button', onclick: picture }, 'PNG'),
    h('button', { type: 'button', onclick: table }, 'CSV'));

  // ---- pictures with their patches
  const pictures = h('div', { class: 'sv-pictures' });
  const views = new Map(); // number of a picture -> {canvas, image, info}
  function showPictures() {
    views.clear();
    pictures.replaceChildren(...row.pictures.map(info => {
      const scale = MOST_SIDE / Math.max(info.width, info.height);
      const [w, high] = [Math.round(info.width * scale), Math.round(info.height * scale)];
      const canvas = h('canvas', { style: { width: `${w}px`, height: `${high}px` }, role: 'img',
        'aria-label': `picture ${info.number} of the batch, ${info.grid[0]} by ${info.grid[1]} patches`,
        onclick: event => patchAt(info, event.offsetX / w, event.offsetY / high) });
      const image = new Image();
      const view = { canvas, image, info, w, high };
      views.set(info.number, view);
      image.onload = () => paintPicture(view);
      image.src = info.src;
      const linked = info.side ? info.side > 1 ? `, ${info.side} × ${info.side} patches a token` : ''
        : ', whose tokens stand for no single patch';
      return h('figure', {}, canvas, h('figcaption', {},
        `picture ${info.number}: ${info.width} × ${info.height} px, ${info.grid[1]} × ${info.grid[0]} ` +
        `patches of ${info.patch} px, ${info.tokens} tokens${linked}`));
    }));
    pictures.hidden = !row.pictures.length;
  }

  const firstOf = number => row.tokens.image.indexOf(number);
  function paintPicture({ canvas, image, info, w, high }) {
    const ratio = devicePixelRatio || 1;
    [canvas.width, canvas.height] = [w * ratio, high * ratio];
    const c = canvas.getContext('2d');
    c.scale(ratio, ratio);
    c.imageSmoothingEnabled = info.width > w;
    c.drawImage(image, 0, 0, w, high);
    if (!info.patch) return;
    const side = (info.patch / info.width) * w;
    const seen = new Set(seenBy(at).filter(i => row.tokens.image[i] === info.number)
      .map(i => i - firstOf(info.number)));
    const mine = row.tokens.image[at] === info.number ? at - firstOf(info.number) : -1;
    const size = side * (info.side || 1);
    info.places.forEach((place, i) => {
      if (!place) return;
      const [x, y] = [place[1] * size, place[0] * size];
      if (!seen.has(i)) {
        c.fillStyle = 'rgba(0, 0, 0, 0.55)';
        c.fillRect(x, y, size, size);
      }
    });
    c.strokeStyle = 'rgba(255, 255, 255, 0.45)';
    c.lineWidth = 1;
    c.beginPath();
    for (let x = size; x < w - 1; x += size) c.moveTo(x, 0), c.lineTo(x, high);
    for (let y = size; y < high - 1; y += size) c.moveTo(0, y), c.lineTo(w, y);
    c.stroke();
    if (mine >= 0 && info.places[mine]) {
      c.strokeStyle = '#e69f00';
      c.lineWidth = 3;
      c.strokeRect(info.places[mine][1] * size + 1, info.places[mine][0] * size + 1, size - 2, size - 2);
    }
  }
  function patchAt(info, x, y) {
    const size = info.patch * info.side;
    if (!size) return;
    const spot = [Math.floor((y * info.height) / size), Math.floor((x * info.width) / size)];
    const i = info.places.findIndex(p => p && p[0] === spot[0] && p[1] === spot[1]);
    if (i >= 0) look(firstOf(info.number) + i);
  }

  // ---- tokens
  const flow = h('div', { class: 'sv-flow', tabindex: 0, role: 'listbox', onkeydown: keys,
    'aria-label': 'Tokens of the row' });
  let chips = new Map(); // token -> its chip; of a folded picture all share one
  function showTokens() {
    const t = row.tokens;
    chips = new Map();
    const nodes = [];
    for (let i = 0; i < t.id.length; i++) {
      if (i === 0 || t.document[i] !== t.document[i - 1]) nodes.push(heading(t.document[i]));
      const picture = t.image[i];
      let last = i;
      if (picture >= 0 && !spread.has(picture))
        while (last + 1 < t.id.length && t.image[last + 1] === picture) last++;
      if (t.kind[i] === 'padding')
        while (last + 1 < t.id.length && t.kind[last + 1] === 'padding') last++;
      const chip = last > i ? folded(i, last) : single(i);
      for (let k = i; k <= last; k++) chips.set(k, chip);
      nodes.push(chip);
      i = last;
    }
    flow.replaceChildren(...nodes);
  }
  function heading(number) {
    const d = row.documents[number];
    return h('div', { class: 'sv-doc' }, d
      ? `document ${number} · sample ${d.id} · ${d.length} tokens, ${d.targets} learnt` : 'padding');
  }
  const id = i => `${uid}-${i}`;
  function single(i) {
    const t = row.tokens;
    return h('span', { class: 'sv-token', id: id(i), role: 'option', 'data-kind': t.kind[i],
      'data-learnt': t.learnt[i], onclick: () => look(i),
      title: `token ${i}: id ${t.id[i]}, document ${t.document[i]}, position ${t.position[i]}` +
        `${t.learnt[i] ? ', learnt' : ''}` },
      VISIBLE(t.piece[i]), h('small', {}, String(t[under.value][i])));
  }
  function folded(first, last) {
    const t = row.tokens;
    const picture = t.image[first];
    const what = picture >= 0 ? `▦ picture ${picture}` : t.piece[first];
    return h('span', { class: 'sv-token', id: id(first), role: 'option', 'data-kind': t.kind[first],
      'data-learnt': t.learnt.slice(first, last + 1).some(Boolean),
      title: `tokens ${first} to ${last}; Enter or a double click shows each`,
      onclick: () => look(first), ondblclick: () => unfold(picture) },
      what, h('small', {}, `${last - first + 1} tokens`));
  }
  function unfold(picture) {
    if (picture < 0) return;
    spread.has(picture) ? spread.delete(picture) : spread.add(picture);
    showTokens();
    look(at);
  }
  function keys(event) {
    const n = row.tokens.id.length;
    const next = from => {
      let i = from;
      while (i < n - 1 && chips.get(i) === chips.get(from)) i++;
      return i;
    };
    const first = of => [...chips].find(([, chip]) => chip === chips.get(of))[0];
    const moves = { ArrowRight: () => next(at), ArrowLeft: () => first(Math.max(0, first(at) - 1)),
      Home: () => 0, End: () => n - 1, Enter: () => (unfold(row.tokens.image[at]), at) };
    if (event.key in moves) look(moves[event.key]());
    else if (event.key === 'PageDown') move(1);
    else if (event.key === 'PageUp') move(-1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // ---- the mask
  const mask = h('canvas', { tabindex: 0, role: 'img', style: { width: `${SIDE}px`, height: `${SIDE}px` },
    'aria-label': 'Attention mask: each line is a token, each column a token that it may see',
    onclick: event => look(Math.floor((event.offsetY / SIDE) * row.tokens.id.length)),
    onkeydown: event => {
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      look(at + by);
    } });
  const seenBy = i => (row.sees[i] || []).flatMap(([from, to]) =>
    Array.from({ length: to - from }, (_, k) => from + k));
  function paintMask(canvas = mask, side = SIDE, ratio = devicePixelRatio || 1) {
    const n = row.tokens.id.length;
    const fine = Math.ceil((side * ratio) / n); // whole pixels for each token, else lines blur
    [canvas.width, canvas.height] = [n * fine, n * fine];
    const c = canvas.getContext('2d');
    c.scale(fine, fine);
    const style = theme(root);
    c.fillStyle = style.paper;
    c.fillRect(0, 0, n, n);
    for (let q = 0; q < n; q++)
      for (const [from, to] of row.sees[q]) {
        c.fillStyle = row.tokens.document[q] % 2 ? '#56B4E9' : '#0072B2';
        if (row.tokens.document[q] < 0) c.fillStyle = style.line;
        c.fillRect(from, q, to - from, 1);
      }
    c.fillStyle = '#D55E00';
    for (let q = 0; q < n; q++) if (row.tokens.learnt[q]) c.fillRect(n - Math.max(2, n / 60), q, n / 50, 1);
    c.strokeStyle = '#E69F00';
    c.lineWidth = Math.max(1, (1.5 * n) / side);
    c.strokeRect(0, at, n, 1);
  }

  // ---- looking from a token
  function look(i) {
    at = Math.max(0, Math.min(row.tokens.id.length - 1, i));
    const seen = new Set(seenBy(at));
    for (const chip of new Set(chips.values())) chip.dataset.unseen = chip.dataset.at = 'false';
    for (const chip of new Set(chips.values())) chip.dataset.unseen = 'true';
    for (const [k, chip] of chips) if (seen.has(k)) chip.dataset.unseen = 'false';
    const mine = chips.get(at);
    mine.dataset.at = 'true';
    flow.setAttribute('aria-activedescendant', mine.id);
    const low = mine.offsetTop - flow.offsetTop;
    if (low < flow.scrollTop || low > flow.scrollTop + flow.clientHeight - 40)
      flow.scrollTop = low - flow.clientHeight / 2;
    paintMask();
    views.forEach(paintPicture);
    const t = row.tokens;
    const ahead = [...seen].filter(k => k > at).length;
    tell(`token ${at}: ${JSON.stringify(VISIBLE(t.piece[at]))}, id ${t.id[at]}, document ${t.document[at]}, ` +
      `position ${t.position[at]}, ${t.learnt[at] ? 'learnt' : 'not learnt'}; sees ${seen.size} tokens` +
      (ahead ? `, ${ahead} of them after it` : ''));
  }

  // ---- exports
  function table() {
    const t = row.tokens;
    const head = ['token', 'id', 'piece', 'kind', 'learnt', 'document', 'position', 'picture', 'sees'];
    save('row.csv', csv([head, ...t.id.map((one, i) => [i, one, t.piece[i], t.kind[i], t.learnt[i],
      t.document[i], t.position[i], t.image[i], row.sees[i].map(r => r.join('-')).join(' ')])]));
  }
  function picture() {
    const out = h('canvas');
    const wide = Math.max(1, row.pictures.length) * (MOST_SIDE + 10) + 510;
    [out.width, out.height] = [wide * 2, 520 * 2];
    const c = out.getContext('2d');
    c.scale(2, 2);
    const style = theme(root);
    c.fillStyle = style.paper;
    c.fillRect(0, 0, wide, 520);
    let x = 5;
    for (const view of views.values()) {
      c.drawImage(view.canvas, x, 5, view.w, view.high);
      x += view.w + 10;
    }
    const big = h('canvas');
    paintMask(big, 500, 2);
    c.drawImage(big, wide - 505, 5, 500, 500);
    c.fillStyle = style.ink;
    c.font = '12px system-ui, sans-serif';
    c.fillText(where.textContent, 5, 512);
    out.toBlob(blob => save('row.png', blob));
  }

  const key = (text, style) => h('label', {}, h('span', { class: 'sv-key', style }), text);
  const legend = h('div', { class: 'vc-bar' },
    key('learnt', { background: 'color-mix(in srgb, #d55e00 25%, transparent)', borderBottomColor: '#d55e00' }),
    key('read', {}), key('picture', { borderBottomColor: '#0072b2' }),
    key('control', { borderStyle: 'dashed', borderBottomStyle: 'solid' }),
    h('span', { class: 'vc-dim' }, 'pale: not seen by the token with the frame'),
    h('span', { class: 'vc-fill' }), h('label', {}, 'under each', under));
  const about = h('p', { class: 'vc-dim', style: { margin: '6px 0 0' } });
  const root = h('section', { class: 'vc sv', 'data-lm-suppress-shortcuts': true, 'aria-label': 'Sample viewer' }, bar, note, pictures,
    h('div', { class: 'sv-columns' }, h('div', {}, legend, flow),
      h('div', { class: 'sv-mask' }, mask, about)));
  const uid = `sv${Math.random().toString(36).slice(2, 8)}`;

  function show(next) {
    row = next;
    recipe.value = row.recipe;
    stage.replaceChildren(...(settings.stages[row.recipe] || [row.stage]).map(name => h('option', { value: name }, name)));
    stage.value = row.stage;
    where.textContent = `step ${row.step + 1}, micro-batch ${row.number}, row ${row.row + 1} of ${row.rows}: ` +
      `${row.tokens.id.length} tokens, ${row.documents.length} document${row.documents.length === 1 ? '' : 's'} ` +
      (row.packing ? '(packed)' : '(padded)');
    about.textContent = 'Attention mask: a line for each token, blue where it sees; orange at the right: ' +
      `learnt. ${row.bidirectional ? 'Tokens of a picture see each other both ways.' : 'Causal, pictures too.'}`;
    back.disabled = row.number === 0 && row.row === 0;
    spread = new Set();
    showPictures();
    showTokens();
    const begin = row.tokens.learnt.indexOf(true);
    look(begin < 0 ? 0 : begin);
  }
  const arrived = message => {
    if (message.kind === 'row') show(message.row);
    else if (message.kind === 'said') tell(message.text, message.bad);
  };
  el.append(h('style', {}, WIDGET_CSS), root);
  model.on('msg:custom', arrived);
  show(row);
  const unthemed = onTheme(() => paintMask());
  return () => {
    model.off('msg:custom', arrived);
    unthemed();
  };
}

const widget = { render: ({ model, el }) => mountViewer(el, model) };
export default widget;
