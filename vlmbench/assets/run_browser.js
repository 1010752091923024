// The run browser (vlmbench.lab.run_browser): a table that draws only the rows in sight, and what
// there is to see of the chosen ones.
const HIGH = 28; // of a row in px, as in run_browser.css
const MOST = SERIES.length; // runs that are looked at together
const GLYPHS = {
  completed: '✓', running: '▶', failed: '✕', preempted: '‖', interrupted: '■', lost: '?',
  refused: '⊘', submitted: '…', 'never started': '–', unreadable: '!',
};
const CAN_RESUME = ['failed', 'preempted', 'interrupted', 'lost'];
const COLUMNS = [
  ['', 'mark', ''],
  ['run', 'folder', ''],
  ['recipe', 'recipe', ''],
  ['scale', 'scale', 'rb-wide'],
  ['seed', 'seed', 'rb-wide rb-num'],
  ['state', 'status', ''],
  ['started', 'started', 'rb-wide'],
  ['took', 'seconds', 'rb-wide rb-num'],
  ['score', 'score', 'rb-num'],
  ['progress', 'progress', 'rb-wide'],
];

function shownValue(row, key) {
  if (key === 'started') return row.started.slice(0, 16).replace('T', ' ');
  if (key === 'seconds') return duration(row.seconds);
  if (key === 'score') return row.score == null ? '' : row.score.toFixed(3);
  if (key === 'progress') return row.progress || (row.queue && `${row.queue}, ${row.where}`) || row.reason;
  return row[key] == null ? '' : String(row[key]);
}

function swatch(slot) {
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 26 10" class="rb-swatch"
    aria-hidden="true"><line x1="1" y1="5" x2="25" y2="5" stroke="${SERIES[slot]}"
    stroke-width="3.5" stroke-dasharray="${DASHES[slot].join(' ')}"/></svg>`;
  return new DOMParser().parseFromString(svg, 'image/svg+xml').documentElement;
}

function mountBrowser(el, model) {
  const rows = new Map();
  let shown = [];
  let order = { key: 'started', down: true };
  let cursor = 0;
  const chosen = new Map(); // folder -> slot of its colour
  const got = { curves: new Map(), difference: null, answers: null };
  const settings = model.get('settings');

  // ---- what is asked for
  const words = h('input', {
    type: 'search', placeholder: 'filter: any words', 'aria-label': 'Filter by words',
    style: { minWidth: '170px', flex: '1' }, oninput: () => filter(),
  });
  const pick = name => h('select', { 'aria-label': `Filter by ${name}`, onchange: () => filter() });
  const [recipe, scale, state] = ['recipe', 'scale', 'state'].map(pick);
  const day = name => h('input', {
    type: 'date', 'aria-label': `Started ${name}`, onchange: () => filter(),
  });
  const [since, until] = [day('since'), day('until')];
  const count = h('span', { class: 'vc-dim', role: 'status' });
  const clear = h('button', { type: 'button', onclick: () => {
    words.value = recipe.value = scale.value = state.value = since.value = until.value = '';
    filter();
  } }, 'Clear');
  const bar = h('div', { class: 'vc-bar' }, words, recipe, scale, state,
    h('label', {}, 'from', since), h('label', {}, 'to', until), clear, count,
    h('button', { type: 'button', onclick: saveTable }, 'CSV'));

  // ---- the table
  const head = h('div', { class: 'rb-line rb-head', role: 'row' }, COLUMNS.map(([name, key, cls]) =>
    h('span', { class: cls, role: 'columnheader', 'data-key': key }, name
      ? h('button', { type: 'button', onclick: () => sortBy(key) }, name) : '')));
  const body = h('div', {
    class: 'rb-body', role: 'grid', tabindex: 0, 'aria-label': 'Runs', 'aria-multiselectable': true,
    onscroll: () => draw(), onkeydown: keys,
  });
  const space = h('div');
  body.append(space);
  const table = h('div', { class: 'rb-table' }, head, body);

  function options(select, name, key) {
    const counts = new Map();
    for (const row of rows.values()) counts.set(row[key], (counts.get(row[key]) || 0) + 1);
    const kept = select.value;
    select.replaceChildren(h('option', { value: '' }, `any ${name}`), ...[...counts].sort()
      .filter(([value]) => value)
      .map(([value, n]) => h('option', { value }, `${value} (${n})`)));
    select.value = counts.has(kept) ? kept : '';
  }

  function filter() {
    const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = [];
    for (const row of rows.values()) {
      if (recipe.value && row.recipe !== recipe.value) continue;
      if (scale.value && row.scale !== scale.value) continue;
      if (state.value && row.status !== state.value) continue;
      if (since.value && row.started.slice(0, 10) < since.value) continue;
      if (until.value && row.started.slice(0, 10) > until.value) continue;
      if (asked.every(word => row.text.includes(word))) shown.push(row);
    }
    sort();
  }

  function sort() {
    const { key, down } = order;
    const empty = v => v == null || v === '';
    shown.sort((a, b) => {
      const [x, y] = [a[key], b[key]];
      if (empty(x) || empty(y)) return empty(x) - empty(y); // without a value: last either way
      const less = typeof x === 'number' ? x - y : x < y ? -1 : x > y ? 1 : 0;
      return down ? -less : less;
    });
    for (const cell of head.children) {
      const mine = cell.dataset.key === key;
      cell.setAttribute('aria-sort', mine ? (down ? 'descending' : 'ascending') : 'none');
      if (cell.firstChild && cell.dataset.key !== 'mark')
        cell.firstChild.textContent = COLUMNS.find(c => c[1] === cell.dataset.key)[0] +
          (mine ? (down ? ' ▾' : ' ▴') : '');
    }
    cursor = Math.max(0, Math.min(cursor, shown.length - 1));
    count.textContent = `${shown.length.toLocaleString('en')} of ${rows.size.toLocaleString('en')} runs`;
    body.setAttribute('aria-rowcount', shown.length);
    space.style.height = `${shown.length * HIGH}px`;
    body.style.height = `${Math.max(3, Math.min(11, rows.size)) * HIGH}px`;
    draw();
  }

  function sortBy(key) {
    order = { key, down: order.key === key ? !order.down : key !== 'folder' && key !== 'recipe' };
    sort();
  }

  function draw() {
    const first = Math.max(0, Math.floor(body.scrollTop / HIGH) - 3);
    const last = Math.min(shown.length, first + Math.ceil(body.clientHeight / HIGH) + 6);
    const lines = [];
    for (let i = first; i < last; i++) lines.push(line(shown[i], i));
    if (!shown.length) lines.push(h('p', { class: 'vc-dim', style: { padding: '0 12px' } },
      rows.size ? 'No run is like that.' : `There is no run below ${settings.root}.`));
    body.replaceChildren(space, ...lines);
    const at = lines.find(node => node.dataset && node.dataset.at === 'true');
    if (at) body.setAttribute('aria-activedescendant', at.id);
  }

  function line(row, i) {
    const slot = chosen.get(row.folder);
    const node = h('div', {
      class: 'rb-line', role: 'row', id: `${uid}-${i}`, 'aria-rowindex': i + 1, 'data-folder': row.folder,
      'aria-selected': slot !== undefined, 'data-at': i === cursor, style: { top: `${i * HIGH}px` },
      title: row.reason ? `${row.folder}\n${row.reason}` : row.folder,
      onclick: event => {
        cursor = i;
        event.ctrlKey || event.metaKey || event.shiftKey || event.target.closest('input')
          ? toggle(row.folder) : only(row.folder);
        body.focus({ preventScroll: true });
      },
    });
    for (const [, key, cls] of COLUMNS) {
      const cell = h('span', { class: cls, role: 'gridcell' });
      if (key === 'mark') cell.append(slot === undefined ? tick() : swatch(slot));
      else if (key === 'status') {
        cell.classList.add('rb-state');
        cell.dataset.state = row.status;
        cell.textContent = `${GLYPHS[row.status] || '·'} ${row.status}`;
      } else cell.textContent = shownValue(row, key);
      node.append(cell);
    }
    return node;
  }

  const tick = () => h('input', {
    type: 'checkbox', tabindex: -1, 'aria-label': 'look at this run too',
  });

  function keys(event) {
    const page = Math.floor(body.clientHeight / HIGH);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    if (event.key in moves) {
      cursor = Math.max(0, Math.min(shown.length - 1, cursor + moves[event.key]));
      const top = cursor * HIGH;
      if (top < body.scrollTop) body.scrollTop = top;
      if (top + HIGH > body.scrollTop + body.clientHeight)
        body.scrollTop = top + HIGH - body.clientHeight;
      draw();
    } else if (event.key === ' ' && shown.length) toggle(shown[cursor].folder);
    else if (event.key === 'Enter' && shown.length) only(shown[cursor].folder);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  function saveTable() {
    const keys = COLUMNS.map(c => c[1]).filter(key => key !== 'mark');
    const numbers = [...new Set(shown.flatMap(row => Object.keys(row.numbers)))];
    const all = [...keys, 'reason', 'host', 'job', ...numbers.filter(n => n !== 'score')];
    save('runs.csv', csv([all, ...shown.map(row => all.map(key => row[key] ?? row.numbers[key]))]));
  }

  // ---- what is chosen
  function only(folder) {
    chosen.clear();
    chosen.set(folder, 0);
    look();
  }

  function toggle(folder) {
    if (chosen.has(folder)) chosen.delete(folder);
    else if (chosen.size >= MOST) return tell(`At most ${MOST} runs are looked at together.`, true);
    else {
      const used = new Set(chosen.values());
      chosen.set(folder, [0, 1, 2, 3, 4, 5].find(slot => !used.has(slot)));
    }
    look();
  }

  function look() {
    draw();
    got.difference = got.answers = null;
    disarm();
    model.send({ want: 'runs', folders: [...chosen.keys()] });
    panel();
  }

  const named = folder => folder === '.' ? settings.root : folder;
  const legend = h('div', { class: 'vc-bar', 'aria-label': 'Chosen runs' });
  const note = h('div', { class: 'vc-note', role: 'status' });
  const tell = (text, bad = false) => {
    note.textContent = text;
    note.dataset.bad = bad;
  };

  // ---- stop and resume: the first press asks, the second does
  let armed = null;
  const act = name => h('button', { type: 'button', disabled: true, onclick: () => {
    const [folder] = chosen.keys();
    if (armed === name) {
      model.send({ do: name, folder });
      return disarm();
    }
    armed = name;
    relabel();
    tell(name === 'stop' ? `${named(folder)} will be told to stop after its step, with a checkpoint. Press again.`
      : `${named(folder)} will go on from its last checkpoint. Press again.`);
  } });
  const stop = act('stop');
  const resume = act('resume');
  const relabel = () => {
    stop.textContent = armed === 'stop' ? 'Stop it' : 'Stop';
    resume.textContent = armed === 'resume' ? 'Resume it' : 'Resume';
  };
  function disarm() {
    armed = null;
    relabel();
    const [folder] = chosen.keys();
    const row = chosen.size === 1 ? rows.get(folder) : null;
    const live = !settings.static && row;
    stop.disabled = !(live && row.can_stop);
    resume.disabled = !(live && CAN_RESUME.includes(row.status) && !row.queue);
  }

  // ---- curves
  const reading = h('div', { class: 'vc-note', 'aria-live': 'polite' });
  const plot = chart(270, text => (reading.textContent = text));
  const choice = (label, names, redraw) => {
    const select = h('select', { 'aria-label': label, onchange: redraw },
      names.map(name => h('option', { value: name }, name)));
    return select;
  };
  const metric = choice('Number', ['loss'], () => curves());
  const over = choice('Over', ['step', 'target tokens', 'hours'], () => curves());
  const smooth = choice('Smoothing', ['smooth: none', 'smooth: a little', 'smooth: much'], () => curves());
  smooth.value = 'smooth: a little';
  const log = h('input', { type: 'checkbox', onchange: () => curves() });
  const curvePanel = h('div', {}, h('div', { class: 'vc-bar' }, metric, h('label', {}, 'over', over),
    smooth, h('label', {}, log, 'log scale'), h('span', { class: 'vc-fill' }),
    h('button', { type: 'button', onclick: () => plot.png('curves.png') }, 'PNG'),
    h('button', { type: 'button', onclick: saveCurves }, 'CSV')), plot.box, reading);

  function joined(folder) {
    const run = got.curves.get(folder);
    const out = { xs: [], columns: {}, marks: [] };
    let [base, hours] = [0, 0];
    for (const stage of run ? run.stages : []) {
      const c = stage.columns;
      const steps = c.step || [];
      const n = steps.length;
      let seen = 0;
      const xs = steps.map((s, i) => {
        if (over.value === 'step') return base + s;
        if (over.value === 'target tokens') return base + ((c.seen_targets || [])[i] || 0);
        hours += (((c.step_s || [])[i] || 0) * (i ? s - steps[i - 1] : s)) / 3600;
        return hours;
      });
      if (n) out.marks.push({ x: xs[0], name: stage.name });
      for (const name of new Set([...Object.keys(out.columns), ...Object.keys(c)])) {
        out.columns[name] ||= Array(out.xs.length).fill(null);
        out.columns[name].push(...(c[name] || Array(n).fill(null)));
      }
      out.xs.push(...xs);
      if (over.value !== 'hours' && n) base = xs[n - 1];
    }
    return out;
  }

  function curves() {
    const weight = { 'smooth: none': 0, 'smooth: a little': 0.8, 'smooth: much': 0.97 }[smooth.value];
    const lines = [];
    let marks = [];
    const names = new Set();
    for (const [folder, slot] of chosen) {
      const run = joined(folder);
      Object.keys(run.columns).forEach(name => names.add(name));
      const ys = run.columns[metric.value] || run.xs.map(() => null);
      if (weight) lines.push({ name: folder, slot, xs: run.xs, ys, pale: true });
      lines.push({ name: named(folder), slot, xs: run.xs, ys: smoothed(ys, weight) });
      if (!marks.length) marks = run.marks;
    }
    names.delete('step');
    const kept = metric.value;
    const sorted = ['loss', ...[...names].filter(n => n !== 'loss').sort()];
    if (sorted.join() !== [...metric.options].map(o => o.value).join()) {
      metric.replaceChildren(...sorted.map(name => h('option', { value: name }, name)));
      metric.value = sorted.includes(kept) ? kept : 'loss';
    }
    const empty = !chosen.size ? 'choose a run above: click, or arrow keys and space'
      : settings.static && ![...chosen.keys()].some(f => got.curves.has(f))
        ? 'this page holds no curves of that run; the browser in a notebook does'
        : [...chosen.keys()].every(f => got.curves.has(f)) ? 'no steps have been logged yet'
          : 'asked the kernel, which answers when no cell is running …';
    plot.draw({ lines, marks, x: over.value, y: metric.value, log: log.checked, empty });
  }

  function saveCurves() {
    const out = [['run', over.value, metric.value]];
    for (const folder of chosen.keys()) {
      const run = joined(folder);
      run.xs.forEach((x, i) => out.push([folder, x, (run.columns[metric.value] || [])[i]]));
    }
    save('curves.csv', csv(out));
  }

  // ---- details, difference, answers
  const panels = { Curves: curvePanel };
  for (const name of ['Details', 'Difference', 'Answers']) panels[name] = h('div', { class: 'vc-scroll' });
  let open = 'Curves';
  const holder = h('div', { class: 'rb-panel', role: 'tabpanel' });
  const strip = tabs(Object.keys(panels), name => {
    open = name;
    holder.replaceChildren(panels[name]);
    panel();
  });

  function details() {
    const runs = [...chosen.keys()].map(folder => rows.get(folder)).filter(Boolean);
    if (!runs.length) return hint('Choose a run above.');
    const numbers = [...new Set(runs.flatMap(row => Object.keys(row.numbers)))].sort();
    const facts = [
      ['state', row => `${GLYPHS[row.status] || ''} ${row.status}`], ['reason', row => row.reason],
      ['notebook', row => row.notebook], ['recipe', row => row.recipe], ['scale', row => row.scale],
      ['seed', row => row.seed], ['label', row => row.label], ['started', row => row.started],
      ['took', row => duration(row.seconds)], ['host', row => row.host],
      ['job', row => row.job && `${row.job} ${row.queue} ${row.where}`],
      ...numbers.map(name => [name, row => row.numbers[name] == null ? '' : short(row.numbers[name])]),
    ];
    const filled = facts.filter(([, get]) => runs.some(row => get(row) != null && get(row) !== ''));
    return grid(['', ...runs.map(row => heading(row.folder))],
      filled.map(([name, get]) => [name, ...runs.map(row => String(get(row) ?? ''))]));
  }

  const heading = folder => h('span', { class: 'rb-chip' }, swatch(chosen.get(folder) ?? 0), named(folder));
  const hint = text => h('p', { class: 'vc-dim' }, text);
  const grid = (top, lines) => h('table', {}, h('thead', {}, h('tr', {}, top.map(t => h('th', { scope: 'col' }, t)))),
    h('tbody', {}, lines.map(cells => h('tr', {}, cells.map((cell, i) => h(i ? 'td' : 'th', { scope: i ? null : 'row' }, cell ?? ''))))));

  function difference() {
    if (chosen.size !== 2) return hint('Choose two runs above to see in what their recipes differ.');
    const d = got.difference;
    if (!d) return hint(settings.static ? 'This page does not hold that comparison.' : 'Comparing …');
    if (!d.rows.length) return hint('They have recorded the same recipe, parameters, data, code and versions.');
    const value = v => h('code', {}, v === null ? '–' : typeof v === 'string' ? v : JSON.stringify(v));
    return h('div', {},
      h('button', { type: 'button', style: { float: 'right' }, onclick: () =>
        save('difference.csv', csv([['field', ...d.folders], ...d.rows.map(([f, a, b]) =>
          [f, JSON.stringify(a), JSON.stringify(b)])])) }, 'CSV'),
      grid([`${d.rows.length} fields differ`, ...d.folders.map(heading)],
        d.rows.map(([field, a, b]) => [h('code', {}, field), value(a), value(b)])));
  }

  function answers() {
    if (!chosen.size) return hint('Choose runs above to read their answers.');
    const given = got.answers;
    if (!given) return hint(settings.static ? 'This page does not hold their answers.' : 'Reading …');
    if (!given.rows.length) return hint('These runs have kept no answers with pictures.');
    return h('div', { class: 'rb-answers' }, given.rows.map(row => h('article', { class: 'rb-card' },
      h('img', { src: row.picture, alt: `picture of ${row.id}` }),
      h('div', {}, h('p', {}, h('strong', {}, row.question)),
        h('p', { class: 'vc-dim' }, `right: ${row.answers.join(' / ')}`)),
      h('div', { class: 'rb-said' }, given.folders.flatMap((folder, i) => {
        const said = row.said[i];
        const right = said && said.score != null ? said.score >= 0.5 : null;
        return [swatch(chosen.get(folder) ?? i), h('span', {
          style: { color: right == null ? '' : `var(--${right ? 'good' : 'bad'})` },
          'aria-label': right == null ? 'not scored' : right ? 'right' : 'wrong',
        }, right == null ? '–' : right ? '✓' : '✗'), h('span', { title: folder },
          said ? said.text || '(nothing)' : h('span', { class: 'vc-dim' }, 'not asked'))];
      })))));
  }

  function panel() {
    legend.replaceChildren(...(chosen.size ? [...chosen.keys()].map(heading)
      : [h('span', { class: 'vc-dim' }, 'no run is chosen')]));
    if (open === 'Curves') return curves();
    panels[open].replaceChildren({ Details: details, Difference: difference, Answers: answers }[open]());
  }

  // ---- what arrives
  function take(list, gone = []) {
    for (const row of list) {
      row.text = [row.folder, row.notebook, row.recipe, row.scale, row.label, row.status, row.reason,
        row.started, row.host, row.job, row.progress, `s${row.seed}`].join(' ').toLowerCase();
      rows.set(row.folder, row);
    }
    for (const folder of gone) {
      rows.delete(folder);
      chosen.delete(folder);
    }
    options(recipe, 'recipe', 'recipe');
    options(scale, 'scale', 'scale');
    options(state, 'state', 'status');
    filter();
    if (!armed) disarm();
    if (open === 'Details') panel();
  }

  const same = folders => folders.join('\n') === [...chosen.keys()].join('\n');
  const arrived = message => {
    if (message.kind === 'rows') take(message.rows, message.gone);
    else if (message.kind === 'curves') {
      for (const run of message.runs) got.curves.set(run.folder, run);
      if (open === 'Curves') curves();
    } else if (message.kind === 'difference' && same(message.folders)) {
      got.difference = message;
      if (open === 'Difference') panel();
    } else if (message.kind === 'answers' && same(message.folders)) {
      got.answers = message;
      if (open === 'Answers') panel();
    } else if (message.kind === 'said') tell(message.text, message.bad);
  };

  const uid = `rb${Math.random().toString(36).slice(2, 8)}`;
  const root = h('section', { class: 'vc rb', 'data-lm-suppress-shortcuts': true, 'aria-label': 'Run browser' }, bar, table,
    h('div', { class: 'vc-bar' }, legend, h('span', { class: 'vc-fill' }),
      settings.static ? null : [resume, stop]), note, strip.bar, holder);
  el.append(h('style', {}, WIDGET_CSS), root);
  model.on('msg:custom', arrived);
  relabel();
  strip.choose('Curves');
  take(model.get('rows'));
  for (const folder of settings.chosen || []) toggle(folder);
  if (!settings.static) model.send({ want: 'rows' });
  const sized = new ResizeObserver(() => draw());
  sized.observe(body);
  const unthemed = onTheme(() => plot.paint());
  return () => {
    model.off('msg:custom', arrived);
    sized.disconnect();
    plot.end();
    unthemed();
  };
}

const widget = { render: ({ model, el }) => mountBrowser(el, model) };
export default widget;
