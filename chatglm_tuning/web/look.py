"""How the page looks, and what it does in the browser by itself: theme, style sheet and script."""

import json
from collections.abc import Mapping
from typing import Final

from gradio import themes

from chatglm_tuning.config.web import Language

# "Noto Sans CJK SC" by name: which Chinese glyphs a browser falls back to would otherwise depend on its own language.
_FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", "sans-serif")
_FIXED_WIDTH_FONTS = ("ui-monospace", "Consolas", "Noto Sans Mono CJK SC", "monospace")

ALIVE_PATH: Final = "/alive"
"""Answers with a word that is another one in every process."""

_CSS: Final = """
.gradio-container .main.app { padding: 12px 24px !important; }
#heading { flex: 1 1 0; width: auto; min-width: 0 !important; }
#heading h1 { font-size: 1.4rem; margin: 0; white-space: nowrap; }
#language { flex: 0 0 auto; width: auto; min-width: 0 !important; }
#language .wrap { flex-wrap: nowrap; }
#left-chat, #right-chat { height: min(50vh, 560px) !important; min-height: 260px; }
.message [data-testid] * { overflow-wrap: anywhere; white-space: pre-wrap !important; }
#question textarea { min-height: 3.6em; }
.facts, .facts * { font-size: .82rem !important; color: var(--body-text-color-subdued) !important; }
.facts { min-height: 1.3em; padding: 0 4px; }
#notice, #added { overflow-wrap: anywhere; padding: 0 4px; }
#notice:not(:has(p)), #added:not(:has(p)) { display: none; }
.wrong, .wrong * { color: var(--wrong) !important; }
.done, .done * { color: var(--done) !important; }
:root { --wrong: #b91c1c; --done: #166534; }
.dark { --wrong: #fca5a5; --done: #86efac; }
#send, #stop, #again, #clear { white-space: nowrap; padding-inline: 6px; }

/* Gradio draws no outline around these. */
input:is([type=checkbox], [type=radio], [type=range], [type=number]):focus-visible, button:focus-visible,
.wrap:has(> .wrap-inner input:focus-visible), .gallery-item:focus-visible {
  outline: 3px solid var(--focus) !important; outline-offset: 2px;
}
:root { --focus: #1d4ed8; }
.dark { --focus: #93c5fd; }

/* Gradio draws a chosen one that is pointed at as if it were not. */
input:is([type=checkbox], [type=radio]):checked:hover { background-color: var(--color-accent) !important; }

/* Once the server is gone: Gradio's "Error" would cover what was written so far. */
#left-chat > .wrap, #right-chat > .wrap { display: none !important; }
#lost { display: none; padding: 8px 12px; border: 2px solid var(--wrong); }
[data-lost] #lost { display: block; position: sticky; top: 4px; z-index: 10; background: var(--body-background-fill); }
[data-lost] .facts, [data-lost] #notice { visibility: hidden; }
[data-lost] :is(#send, #stop, #again, #clear, #add-button) { pointer-events: none; opacity: .4; }

@media (max-width: 640px) {
  .gradio-container .main.app { padding: 8px 12px !important; }
  #heading h1 { font-size: 1.15rem; }
  #left-chat, #right-chat { height: 44vh !important; }
  .gradio-container:has(#right-chat) :is(#left-chat, #right-chat) { height: 20vh !important; min-height: 150px; }
  #left-column, #right-column { gap: 8px; }
  #send, #stop, #again, #clear { font-size: .9rem; }
}
"""

_SCRIPT = """
() => {
  const look_seconds = 2;
  const find = (id) => document.getElementById(id);
  const is_shown = (element) => element !== null && element.getClientRects().length > 0;

  // Send hides and Regenerate is disabled while an answer is written, Stop hides after it: each takes the focus along.
  let focused = null;
  document.addEventListener("focusin", (event) => {
    focused = event.target.matches(":focus-visible") ? event.target.closest("[id]").id : null;
  });
  document.addEventListener("pointerdown", () => { focused = null; }, true);
  const keep_focus = () => {
    const active = document.activeElement;
    if (active !== document.body && !active.disabled && is_shown(active)) return;
    if (focused !== "send" && focused !== "again" && focused !== "stop") return;
    if (is_shown(find("stop"))) find("stop").focus({ focusVisible: true });
    else if (is_shown(find("send"))) document.querySelector("#question textarea").focus();
  };
  new MutationObserver(keep_focus).observe(
    document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ["class", "style", "disabled"] }
  );

  // Whether what this page was talking to is still there.
  let first = null;
  const look = async () => {
    let found = null;
    try {
      const answer = await fetch(ALIVE, { cache: "no-store" });
      if (answer.ok) found = await answer.text();
    } catch {}
    first ??= found;
    document.documentElement.toggleAttribute("data-lost", first !== null && found !== first);
    setTimeout(look, look_seconds * 1000);
  };
  look();
}
"""


def make_theme() -> themes.Base:
    """Return the page's look, with fonts of the reader's machine only."""
    theme = themes.Default(font=_FONTS, font_mono=_FIXED_WIDTH_FONTS)
    # Gradio's own greys are too pale to read.
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )


def make_head() -> str:
    """Return the style sheet, for the page's head: what Gradio is given as `css` it rewrites, and breaks `:is()`."""
    return f"<style>{_CSS}</style>"


def make_script() -> str:
    """Return what every page runs when it is opened."""
    return _SCRIPT.replace("ALIVE", json.dumps(ALIVE_PATH.removeprefix("/")))


def make_title_script(titles: Mapping[Language, str], codes: Mapping[Language, str]) -> str:
    """Return what the browser does with a language that was chosen: titles and language codes by language."""
    return f"""(language) => {{
      document.title = {json.dumps(dict(titles), ensure_ascii=False)}[language];
      document.documentElement.lang = {json.dumps(dict(codes))}[language];
    }}"""
