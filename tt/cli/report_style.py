"""How the page of a report looks: its style sheet, and a colour for each reason.

Light and dark follow the reader's system; on paper it is light.  The colours of the reasons are told apart with each
kind of colour blindness, and stand out from the page by 3:1; text does by 4.5:1 (WCAG 2.2, 1.4.3 and 1.4.11).
Sizes are relative, so that the page fits from 320 px on; only tables scroll, each by itself.
Must not know what the page says.
"""

LIGHT = {
    "page": "#f4f6f8",
    "card": "#ffffff",
    "ink": "#1a2129",
    "soft": "#566170",
    "line": "#dfe4ea",
    "lost": "#e9edf1",
    "not_protocol": "#0072b2",
    "tampered": "#d55e00",
    "bad_hello": "#8f3d97",
    "stalled": "#1f9e77",
    "login_failed": "#7a5200",
    "operator": "#2f3640",
    "adopted": "#8b929c",
    "plain": "#0072b2",
}
DARK = {
    "page": "#101318",
    "card": "#1a1e24",
    "ink": "#e6eaef",
    "soft": "#a3adb9",
    "line": "#2f363f",
    "lost": "#262c34",
    "not_protocol": "#3f9fe0",
    "tampered": "#e8702a",
    "bad_hello": "#e3a3d6",
    "stalled": "#2fc795",
    "login_failed": "#f0c040",
    "operator": "#e8ebef",
    "adopted": "#7c8490",
    "plain": "#3f9fe0",
}
# What a newer server may call a reason has the colour of "adopted": grey.
COLOURED = ("not_protocol", "tampered", "bad_hello", "stalled", "login_failed", "operator", "adopted")

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:76rem;margin:0 auto;padding:2rem 1.5rem 1rem}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.015em;margin:0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0 0 .15rem}
p{margin:.25rem 0}
.soft,caption,figcaption,footer,dd small{color:var(--soft);font-size:.875rem}
.lead{font-size:1.05rem;margin:.9rem 0 0;max-width:60rem}
.gap{border-left:.25rem solid var(--tampered);padding-left:.75rem;margin-top:.75rem}
dl.tiles{display:grid;grid-template-columns:repeat(6,1fr);gap:1rem;margin:1.5rem 0 1rem}
.tiles div,section{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem 1.15rem}
dt{color:var(--soft);font-size:.8125rem}
dd{margin:0}
dd b{display:block;font-size:1.65rem;line-height:1.3;font-weight:650;letter-spacing:-.01em}
dd small{display:block;font-size:.8125rem;line-height:1.35;overflow-wrap:anywhere}
section{margin:0 0 1rem;min-width:0}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
figure{margin:0}
.plot{position:relative;height:15rem;margin:1.1rem 1.75rem 2.6rem 3rem}
.plot>svg{display:block;width:100%;height:100%;overflow:visible}
.plot .y,.plot .x{position:absolute;font-size:.75rem;line-height:1.2;color:var(--soft);white-space:nowrap}
.plot .y{right:100%;padding-right:.5rem;transform:translateY(50%)}
.plot .x{top:100%;padding-top:.45rem;transform:translateX(-50%);text-align:center}
.x b{display:block;color:var(--ink);font-weight:600}
.gridline{stroke:var(--line);stroke-width:1;vector-effect:non-scaling-stroke}
.hit{fill:transparent}
g:hover>.hit{fill:var(--ink);fill-opacity:.07}
.unheld{fill:var(--lost);background:var(--lost)}
ul.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;margin:.5rem 0 0;padding:0;font-size:.875rem}
.swatch{display:inline-block;width:.75rem;height:.75rem;border-radius:.15rem;margin-right:.45rem;vertical-align:-.05rem}
.scroll{overflow-x:auto}
.scroll:focus-visible{outline:2px solid var(--plain);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.875rem}
caption{text-align:left;padding:0 0 .6rem}
caption span{position:sticky;left:0;display:inline-block;max-width:min(100%,100vw - 3.5rem)}
th,td{text-align:left;vertical-align:top;padding:.4rem .75rem .4rem 0;border-top:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead td{border-top:0}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:.8125rem;white-space:nowrap;vertical-align:bottom}
tbody th{font-weight:600}
tbody th.t{font-weight:400}
.n{text-align:right;white-space:nowrap}
.n+.a,.n+.t{padding-left:1rem}
.t,.a{white-space:nowrap}
td.bar{width:42%;min-width:4rem}
.bar svg{display:block;width:100%;height:.85rem;margin-top:.25rem}
.below td{border:0;padding-top:0;overflow-wrap:anywhere;color:var(--soft);font-size:.8125rem;line-height:1.35}
.below code{color:var(--ink)}
code{font:.8125rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
details{margin-top:.6rem;font-size:.875rem}
summary{cursor:pointer;color:var(--soft)}
details .scroll{max-height:20rem;overflow-y:auto;margin-top:.5rem}
footer{padding:.5rem 0 1.5rem}
@media (max-width:64rem){dl.tiles{grid-template-columns:repeat(3,1fr)}}
@media (max-width:52rem){.two{grid-template-columns:1fr;gap:0}}
@media (max-width:36rem){
main{padding:1.1rem .75rem .5rem}
h1{font-size:1.4rem}
dl.tiles{grid-template-columns:1fr 1fr;gap:.6rem;margin:1rem 0 .75rem}
.tiles div,section{padding:.8rem .85rem}
dd b{font-size:1.35rem}
.plot{height:11rem;margin-left:2.4rem}
.x.odd{display:none}
tbody th,thead th:first-child{position:sticky;left:0;background:var(--card)}
table,thead th{font-size:.8125rem}
td,th{padding-right:.5rem}
td.bar{width:18%;min-width:2rem}
}
@media print{
@page{margin:14mm}
body{background:none;font-size:11px}
main{max-width:none;padding:0}
.tiles div,section{border-color:#c8ced6;border-radius:0}
.tiles div,tr,figure{break-inside:avoid}
h2,caption,thead{break-after:avoid}
svg,.swatch{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.scroll{overflow:visible}
table{font-size:10px}
caption,thead th,.below td{font-size:inherit}
.a,.n,thead th{white-space:normal}
td.bar{width:22%}
code{font-size:9px}
details{display:none}
}
"""


def _variables(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())


def _reasons() -> str:
    return "".join(f".r-{name}{{fill:var(--{name});background:var(--{name})}}\n" for name in COLOURED)


STYLE = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n"
    f".r-plain{{fill:var(--plain);background:var(--plain)}}\n{_reasons()}{_RULES.lstrip()}"
)


def reason_class(name: str) -> str:
    """The class that gives what stands for a reason its colour."""
    return f"r-{name if name in COLOURED else 'adopted'}"
