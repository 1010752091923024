// Below each search result what its page says around the words that were looked for (docs/excerpts.py).
'use strict';

const words = (new URLSearchParams(location.search).get('q') || '').toLowerCase().split(/\s+/).filter(Boolean);

// 240 characters around the word that comes first last: one that stands everywhere does not decide
function excerpt(text) {
  const low = text.toLowerCase();
  const places = words.map((w) => low.indexOf(w)).filter((i) => i >= 0);
  const from = places.length ? Math.max(0, Math.max(...places) - 120) : 0;
  const start = from ? text.indexOf(' ', from) + 1 : 0;
  const end = start + 240 < text.length ? text.lastIndexOf(' ', start + 240) : text.length;
  return (start ? '… ' : '') + text.slice(start, end) + (end < text.length ? ' …' : '');
}

function shown(text) {
  const p = document.createElement('p');
  p.className = 'context';
  if (!words.length) return p;
  const escaped = words.map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'));
  text.split(new RegExp(`(${escaped.join('|')})`, 'i')).forEach((part, i) => {
    const node = i % 2 ? document.createElement('b') : document.createElement('span');
    node.textContent = part;
    p.append(node);
  });
  return p;
}

function complete() {
  const root = new URL(document.documentElement.dataset.content_root || './', location.href).href;
  for (const item of document.querySelectorAll('#search-results li:not([data-excerpt])')) {
    const link = item.querySelector('a');
    if (!link) continue;
    item.dataset.excerpt = 'true';
    const page = decodeURI(link.href.split(/[?#]/)[0].slice(root.length)).replace(/\.html$/, '');
    if (EXCERPTS[page]) item.append(shown(excerpt(EXCERPTS[page])));
  }
}

document.addEventListener('DOMContentLoaded', () => {
  const results = document.getElementById('search-results');
  if (!results) return;
  new MutationObserver(complete).observe(results, { childList: true, subtree: true });
  complete();
});
