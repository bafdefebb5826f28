"""The page's style: one sheet for a phone, a wide screen, dark mode and paper; nothing from elsewhere."""

from __future__ import annotations

from scaling.report.theme import PALETTE


def stylesheet() -> str:
    """Return the style sheet, with the pictures' colours as variables for light and dark."""
    light = "".join(f"--{name}:{colour};" for colour, (name, _) in PALETTE.items())
    dark = "".join(f"--{name}:{colour};" for name, colour in PALETTE.values())
    return _SHEET.replace("LIGHT", light).replace("DARK", dark)


_SHEET = """
:root{LIGHT--wash:#f4f6f8;--line:#dfe3e8;--warm:#fdf3e7;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{DARK--wash:#1d2127;--line:#343a42;--warm:#2e2415}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:3rem}
body{margin:0;background:var(--paper);color:var(--ink);
  font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:66rem;margin:0 auto;padding:0 1.1rem}
header{padding-top:2.2rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--line)}
section:first-child h2{border-top:0;margin-top:.6rem}
h3{font-size:.95rem;margin:1.6rem 0 .4rem}
p,ul{margin:.55rem 0;max-width:46rem}
ul{padding-left:1.2rem}
li{margin:.3rem 0}
.subtitle{color:var(--muted);margin-bottom:1rem}
nav{position:sticky;top:0;z-index:2;background:var(--paper);border-bottom:1px solid var(--line)}
nav div{max-width:66rem;margin:0 auto;padding:.45rem 1.1rem;display:flex;gap:1.1rem;
  overflow-x:auto;white-space:nowrap;font-size:.88rem;scrollbar-width:none}
nav a{color:var(--ink);text-decoration:none}
nav a:hover{color:var(--blue);text-decoration:underline}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:1px;
  margin:1.1rem 1px}
.facts div{box-shadow:0 0 0 1px var(--line);padding:.7rem .9rem}
.facts dt{font-size:.8rem;color:var(--muted)}
.facts dd{margin:0;font-size:1.2rem;font-weight:600;line-height:1.35;font-variant-numeric:tabular-nums}
.facts dd+dd{font-size:.82rem;font-weight:400;color:var(--muted)}
.caution{background:var(--warm);border-left:3px solid var(--vermilion);
  padding:.55rem .9rem;margin:.9rem 0;max-width:46rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));
  gap:1.2rem 1.6rem;margin:1rem 0}
figure{margin:0;max-width:36rem}
figure svg{display:block;width:100%;height:auto}
figcaption{font-size:.86rem;color:var(--muted);margin-top:.35rem}
.scroll{overflow:auto;max-width:100%;margin:.3rem 0 .4rem}
.long{max-height:30rem;border:1px solid var(--line)}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;white-space:nowrap;background:var(--wash);position:sticky;top:0}
td{max-width:30rem;overflow-wrap:break-word}
td:first-child{white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap}
pre{font-size:.8rem;background:var(--wash);padding:.7rem .9rem;overflow:auto;max-height:24rem;margin:.3rem 0}
.note{font-size:.84rem;color:var(--muted);margin-top:0}
footer{color:var(--muted);font-size:.84rem;margin-top:3rem;padding-top:1rem;padding-bottom:2.5rem;
  border-top:1px solid var(--line);overflow-wrap:anywhere}
@media (max-width:40rem){
  body{font-size:.97rem}
  h1{font-size:1.4rem}
  .facts{grid-template-columns:1fr 1fr}
  .facts dd{font-size:1.02rem}
  th,td{padding:.3rem .5rem}
  td{max-width:18rem}
  td:first-child{white-space:normal;min-width:6.5rem}
  td:last-child{min-width:9rem}
  td.w{min-width:13rem}
}
@media print{
  @page{margin:14mm}
  nav{display:none}
  body{font-size:10pt}
  main,header,footer{max-width:none;padding:0}
  .long,pre{max-height:none;border:0}
  pre{white-space:pre-wrap}
  .scroll{overflow:visible}
  table{font-size:7.5pt}
  th{position:static;white-space:normal}
  th,td{padding:.12rem .3rem}
  figure,.facts,.caution,tr{break-inside:avoid}
  h2,h3{break-after:avoid}
  .pictures{grid-template-columns:1fr 1fr}
}
""".strip()
