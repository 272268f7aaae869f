"""The fixed text of the page: styles, script and frame."""

from __future__ import annotations

CSS = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --paper: #ffffff; --ground: #f6f7fb; --accent: #4f46e5; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header { background: linear-gradient(120deg, #1e1b4b, #4338ca 70%, #6366f1); color: white; padding: 3rem 0 5.5rem; }
.wrap { max-width: 1180px; margin: 0 auto; padding: 0 1.5rem; }
header h1 { margin: 0 0 .35rem; font-size: 2.1rem; letter-spacing: -.02em; line-height: 1.2; }
header p { margin: 0; color: #c7d2fe; max-width: 60rem; }
main.wrap { margin-top: -3.2rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px; padding: 1.6rem 1.75rem;
  margin-bottom: 1.5rem; box-shadow: 0 1px 2px rgb(15 23 42 / .04), 0 8px 24px rgb(15 23 42 / .05); }
h2 { margin: 0 0 1.1rem; font-size: 1.3rem; letter-spacing: -.01em; }
h3 { margin: 1.6rem 0 .1rem; font-size: 1rem; }
.lead { margin: 0 0 .6rem; color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: .9rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .85rem 1rem; background: #fbfcff; }
.card b { display: block; white-space: nowrap; font-size: 1.3rem; line-height: 1.25; letter-spacing: -.02em;
  color: var(--accent); }
.card span { color: var(--soft); font-size: .85rem; }
.pair { display: grid; grid-template-columns: 3fr 2fr; gap: 1.75rem; }
.pair > div { min-width: 0; }
@media (max-width: 900px) { .pair { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: .76rem; text-transform: uppercase; letter-spacing: .04em; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.group td { font-weight: 650; padding-top: 1.1rem; color: var(--ink); border-bottom-color: #cbd5e1; }
tr.dense td { color: var(--soft); }
tbody tr:hover td { background: #f8f9ff; }
ol.notes { color: var(--soft); font-size: .85rem; margin: .9rem 0 0; padding-left: 1.3rem; }
details { margin-top: .4rem; color: var(--soft); font-size: .88rem; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .82rem; padding-bottom: 2.5rem; }
""".strip()

SCRIPT = """
for (const source of document.querySelectorAll('script[type="application/json"]')) {
  const figure = JSON.parse(source.textContent);
  const target = document.getElementById(source.dataset.target);
  Plotly.newPlot(target, figure.data, figure.layout, {responsive: true, displayModeBar: false});
}
document.documentElement.dataset.ready = 'yes';
""".strip()

# The policy lets nothing be loaded: the page shows the same with or without a network.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
<script>{plotly}</script>
</head>
<body>
<header><div class="wrap"><h1>{title}</h1><p>{subtitle}</p></div></header>
<main class="wrap">
{body}
</main>
<footer class="wrap">{footer}</footer>
<script>{script}</script>
</body>
</html>
"""
