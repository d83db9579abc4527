"""The page's style sheet: light and dark after the reader's own setting, system fonts, no rule that loads anything.

The series' colours are blue and orange, which colour-blind readers tell apart, each checked against its background.
"""

STYLE = """
:root {
  --back: #f6f7f9; --card: #ffffff; --text: #1c2430; --quiet: #5b6675; --line: #e3e7ec;
  --good: #0b7a4b; --good-back: #e6f4ed; --bad: #b3261e; --bad-back: #fbeae9;
  --s0: #2563c9; --s1: #d9730d; --s2: #0b7a4b; --s3: #8a3ab9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #10151c; --card: #18202a; --text: #e6ebf1; --quiet: #9aa7b6; --line: #2a3440;
    --good: #58c796; --good-back: #14302a; --bad: #ff8a80; --bad-back: #3a1d1e;
    --s0: #6aa5ff; --s1: #ffa14d; --s2: #58c796; --s3: #c792ea;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 48px; }
header h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
header p { margin: 0 0 20px; color: var(--quiet); }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 18px 20px; margin: 0 0 16px; min-width: 0; }
h2 { font-size: 16px; margin: 0 0 12px; }
figure { margin: 0; }
.verdict { padding: 12px 16px; margin: 0 0 16px; border: 1px solid var(--line); border-radius: 10px; font-weight: 600; }
.verdict.good { color: var(--good); background: var(--good-back); }
.verdict.bad { color: var(--bad); background: var(--bad-back); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 12px; margin: 0 0 16px; }
.card { padding: 14px 16px; }
.card .value { font-size: 23px; font-weight: 650; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.card .label { color: var(--quiet); font-size: 13px; }
.card.good .value { color: var(--good); } .card.bad .value { color: var(--bad); }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 0 16px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--quiet); font-size: 13px; font-weight: 600; }
th, td { padding: 7px 16px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.caption { color: var(--quiet); font-size: 13px; margin: 10px 0 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 20px; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
footer { color: var(--quiet); font-size: 13px; margin-top: 24px; }
@media (max-width: 440px) { .beside { grid-template-columns: 1fr; } dl { grid-template-columns: 1fr; } }
@media print { section, .card { break-inside: avoid; } }
"""
