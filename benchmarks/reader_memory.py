"""Peak memory and speed of the record readers as the file grows.

    python benchmarks/reader_memory.py [--rows 10000 200000] [--turns 4] [--folder DIR]

Writes LLaVA-like files of each size and reads each one in a fresh process. Two figures per reader:
peak memory above the level before the file is opened, and rows per second. The named baseline is
`json.load` of the same file. A reader that streams has a peak that does not grow with the file
(ratio near 1); the index grows by 24 bytes a row and holds no row."""

import argparse, json, random, subprocess, sys, tempfile, time
from pathlib import Path

READERS = 'read_llava', 'read_llava jsonl', 'Records', 'json.load'
WORDS = (
    'the a red blue small dog cat table is on left of under two people street sign bright café über'
).split()


def make_row(i: int, turns: int, rng: random.Random) -> dict:
    "A row of the shape and size of LLaVA-1.5's instruction mix (1.5 kB at four turns)."
    say = lambda n: ' '.join(rng.choices(WORDS, k=n))
    chat = [
        {
            'from': ('human', 'gpt')[t % 2],
            'value': ('<image>\n' if not t else '') + say(20 + 60 * (t % 2)),
        }
        for t in range(turns)
    ]
    row = {'id': f'{i:012d}', 'image': f'coco/train2017/{i:012d}.jpg', 'conversations': chat}
    if i % 16 == 0:
        del row['image']
        chat[0]['value'] = say(20)
    return row


def write(path: Path, n: int, turns: int) -> None:
    rng, lines = random.Random(0), path.suffix == '.jsonl'
    with open(path, 'w') as f:
        if not lines:
            f.write('[')
        for i in range(n):
            f.write(
                (',' if i and not lines else '')
                + json.dumps(make_row(i, turns, rng))
                + ('\n' if lines else '')
            )
        if not lines:
            f.write(']')


def peak_kb() -> int:
    "Peak resident memory of this process. Not `getrusage`: a child inherits its parent's figure."
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('VmHWM'))


def measure(reader: str, path: str) -> None:
    """In a child process: read the file and print rows, seconds and kilobytes of peak memory above
    the start."""
    from vlmbench.data.record import Records, read_llava

    before, start, n = peak_kb(), time.perf_counter(), 0
    if reader == 'json.load':
        with open(path) as f:
            n = len(json.load(f))
    elif reader == 'Records':
        records = Records(path, '/data')
        n = len(records)
        assert records[n - 1].turns and records[0].turns
    else:
        n = sum(1 for _ in read_llava(path, '/data'))
    seconds = time.perf_counter() - start
    print(json.dumps(dict(rows=n, seconds=seconds, peak_kb=peak_kb() - before)))


def main(rows=(10_000, 200_000), turns=4, folder=None) -> list[dict]:
    "Measure every reader on every size and print the table; returns its rows."
    table = []
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        for n in rows:
            for suffix in ('json', 'jsonl'):
                write(Path(tmp) / f'{n}.{suffix}', n, turns)
            for reader in READERS:
                path = Path(tmp) / f'{n}.{"jsonl" if reader.endswith("jsonl") else "json"}'
                out = subprocess.run(
                    [sys.executable, __file__, '--measure', reader, str(path)],
                    capture_output=True,
                    text=True,
                )
                if out.returncode:
                    sys.exit(out.stderr)
                table.append(
                    dict(reader=reader, mb=path.stat().st_size / 1e6, **json.loads(out.stdout))
                )
                assert table[-1]['rows'] == n
            for suffix in ('json', 'jsonl'):
                (Path(tmp) / f'{n}.{suffix}').unlink()
    print(f'{"reader":18}{"rows":>9}{"file MB":>9}{"peak MB":>9}{"rows/s":>10}')
    for r in table:
        print(
            f'{r["reader"]:18}{r["rows"]:9,}{r["mb"]:9.0f}{r["peak_kb"] / 1024:9.1f}'
            f'{r["rows"] / r["seconds"]:10,.0f}'
        )
    for reader in READERS:
        first, last = [r['peak_kb'] for r in table if r['reader'] == reader][
            :: max(1, len(rows) - 1)
        ][:2]
        print(
            f'{reader}: peak at {rows[-1]:,} rows / peak at {rows[0]:,} rows = '
            f'{last / max(first, 1):.2f}'
        )
    return table


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--rows', type=int, nargs='+', default=[10_000, 200_000])
    p.add_argument('--turns', type=int, default=4)
    p.add_argument('--folder', help='where the files are written (several hundred MB)')
    p.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.measure:
        measure(*a.measure)
    elif len(a.rows) < 2:
        p.error('--rows needs at least two sizes')
    else:
        main(a.rows, a.turns, a.folder)
