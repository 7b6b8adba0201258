"""The looks of a report: on a screen, a phone and paper."""

STYLE = """
:root { color-scheme: light; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d6d6d6; --bad: #b3261e; --caution: #9a5b00;
  --good: #1b6e3c; --unknown: #555; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; padding-bottom: 0.2rem; border-bottom: 1px solid var(--line); }
header p { color: var(--soft); margin: 0.2rem 0 1rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; margin: 1rem 0; }
nav a { color: #0b57a4; }
p, li, dd { overflow-wrap: anywhere; }
.warnings { border: 1px solid var(--line); border-left: 0.4rem solid var(--caution); padding: 0.2rem 1rem 0.8rem; }
.warnings h2 { margin-top: 0.6rem; border: 0; }
.verdicts { list-style: none; padding: 0; margin: 0.6rem 0; }
.verdicts li { padding: 0.25rem 0 0.25rem 0.7rem; border-left: 0.25rem solid var(--line); margin: 0.35rem 0; }
.verdicts em { font-style: normal; font-weight: 600; }
.verdicts strong { display: inline-block; min-width: 4.4rem; }
.good { border-color: var(--good) !important; } .good strong { color: var(--good); }
.note strong { color: #333; }
.unknown { border-color: var(--unknown) !important; } .unknown strong { color: var(--unknown); }
.caution { border-color: var(--caution) !important; } .caution strong { color: var(--caution); }
.bad { border-color: var(--bad) !important; } .bad strong { color: var(--bad); }
dl { display: grid; gap: 0.15rem; margin: 0.8rem 0; }
dl div { display: grid; grid-template-columns: minmax(7rem, 12rem) 1fr; gap: 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; min-width: min(100%, 28rem); font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.3rem; font-size: 0.95rem; }
th, td { padding: 0.25rem 0.7rem 0.25rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; } th.text, td.text { text-align: left; }
thead th { border-bottom: 1px solid var(--ink); color: var(--soft); font-weight: 500; }
tbody tr + tr { border-top: 1px solid #eee; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 0.875rem; max-width: 42rem; }
.gallery { display: flex; flex-wrap: wrap; gap: 0 1.5rem; } .gallery figure { flex: 0 1 27rem; }
details { margin: 0.8rem 0; } summary { cursor: pointer; color: #0b57a4; }
@media (max-width: 40rem) {
  main { padding: 0.5rem 0.9rem 3rem; }
  dl div { grid-template-columns: 1fr; margin-bottom: 0.4rem; }
  h1 { font-size: 1.4rem; }
}
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; } nav { display: none; }
  .wide { overflow: visible; } table { font-size: 8pt; } th, td { white-space: normal; }
  .gallery figure { flex-basis: 46%; }
  figure, tr, .verdicts li { break-inside: avoid; } h2 { break-after: avoid; }
  a { color: inherit; } figure img { max-height: 20cm; }
}
"""
