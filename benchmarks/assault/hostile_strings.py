"""Forty strings that want to be run: by a browser, a plotting library, a notebook, a terminal, a spreadsheet."""

from collections.abc import Sequence

_RUN = "(window.pwned=window.pwned||[]).push({n})"
_STRINGS = (
    # Elements and attributes
    "<script>{run}</script>",
    "</script><script>{run}</script>",
    "</ScRiPt ><SCRIPT>{run}</SCRIPT>",
    "<!--<script>{run}</script>",
    "--><script>{run}</script><!--",
    "</title></textarea></style></template><script>{run}</script>",
    "<img src=x onerror={run}>",
    '"><img src=x onerror="{run}">',
    "'><svg/onload={run}>",
    "<svg><script>{run}</script></svg>",
    "<svg><animate onbegin={run} attributeName=x dur=1s>",
    "<math><mtext><table><mglyph><style><img src=x onerror={run}>",
    "<iframe srcdoc='<script>{bare}</script>'></iframe>",
    "<object data='data:text/html,<script>{run}</script>'></object>",
    "<details open ontoggle={run}>",
    "<body onload={run}>",
    "<input autofocus onfocus={run}>",
    "<video><source onerror={run}></video>",
    "<a href='javascript:{run}'>press</a>",
    '" autofocus onfocus={run} x="',
    # What leaves the page
    "<img src='{url}/{n}'>",
    "<link rel=stylesheet href='{url}/{n}'>",
    "<meta http-equiv=refresh content='0;url={url}/{n}'>",
    "<base href='{url}/{n}/'>",
    "<form action='{url}/{n}'><button autofocus>send</button></form>",
    "<style>@import '{url}/{n}';body{{background:url({url}/{n})}}</style>",
    "![picture]({url}/{n}) [link](javascript:{run})",
    # Inside scripts and data of a page
    "\u2028\u2029</script><script>{run}//",
    "'-{run}-'",
    '\\";{run};//',
    "${{{run}}}`",
    "{{{{constructor.constructor('{run}')()}}}}{{% raw %}}",
    "__proto__ constructor <!--[CDATA[{run}]]>",
    "<b style='x:expression({run})'>%{{x}}<extra></extra>",
    # Terminals
    "\x1b]0;pwned {n}\x07\x1b[2J\x1b[31m",
    "\x1b]8;;{url}/{n}\x07link\x1b]8;;\x07\x9b31m\r",
    "\u202egnp.exe {n} [red][link={url}/{n}]markup[/link]",
    # Spreadsheets
    '=HYPERLINK("{url}/{n}","x")',
    "@SUM(1+1)*cmd|' /C calc {n}'!A0",
    "+1+1\t=2+2\r=3+3 {n}",
)


def marker(number: int) -> str:
    """What shows that a string was shown; it stands behind each, so that a string begins as it must to be run."""
    return f" s{number}e"


def hostile_strings(url: str) -> Sequence[str]:
    """All of them, with their numbers and the address that none may ask."""
    strings = []
    for number, text in enumerate(_STRINGS):
        run = _RUN.format(n=number)
        strings.append(text.format(run=run, bare=run.replace("window.", "parent."), url=url, n=number) + marker(number))
    return strings
