"""Rows per second with a marker of each kind, beside plain image loading (PNG decode to RGB) of the
same picture."""

import argparse

from vlmbench.speed.measures import overlay_speed

p = argparse.ArgumentParser(description=__doc__)
p.add_argument('--width', type=int, default=640)
p.add_argument('--height', type=int, default=480)
p.add_argument('--rounds', type=int, default=10)
a = p.parse_args()
found = overlay_speed(a.rounds, (a.width, a.height))
loading = found['rows_per_s']['loading']
for kind, rate in found['rows_per_s'].items():
    print(f'{kind:14} {rate:8.1f} rows/s {loading / rate:6.2f} x loading')
print(f'slowest: {found["slowest"]}, {found["ratio"]:.2f} times loading alone')
