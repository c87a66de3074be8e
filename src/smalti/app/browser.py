"""The page's styles, colours and script, which add to those of Gradio. The controls are in `page.py`."""

from gradio import themes

CSS = """
#fills img, #images img { image-rendering: pixelated }
#fills .grid-wrap, #images .grid-wrap { padding-top: 2em }  /* the label covers no picture */
#fills .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) }  /* narrow windows cut columns off */
#images .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) }
#editor .empty { display: none }  /* asks for a tool, where an image has to be opened first */
body:not(.dark) [role=tab][aria-selected=true] { color: var(--primary-700) }  /* a contrast of 5.2 instead of 2.8 */
input:is([type=range], [aria-label=class]):focus-visible { outline: 2px solid var(--primary-600); outline-offset: 2px }
#open-status p, #fill-status p, #generate-status p { overflow-wrap: anywhere }
.toast-wrap { position: static !important; order: -1; width: 100% !important }  /* above the page, over no button */
.message { margin: 0; min-height: 1.5em }
.message.problem { color: var(--error-text-color); font-weight: 600 }
#server-gone { margin: 0; padding: 0.75em 1em; text-align: center }
"""
HEAD = """
<script>
// Gradio shows nothing when a button is pressed and its server has ended or was started again.
let servedBy = null;
async function checkServer() {
  let text = "";
  try {
    const answer = await (await fetch("gradio_api/app_id", { cache: "no-store" })).text();
    servedBy ??= answer;
    if (answer !== servedBy) text = "smalti was started again: reload this page. Save the fills that you need first.";
  } catch {
    text = "smalti has ended, so the buttons do nothing: start `smalti app` again, then reload this page.";
  }
  let line = document.getElementById("server-gone");
  if (!line && text) {
    line = document.createElement("p");
    line.id = "server-gone";
    line.className = "message problem";
    line.setAttribute("role", "alert");
    document.body.prepend(line);
  }
  if (line) { line.textContent = text; line.hidden = !text; }
}
setInterval(checkServer, 2000);

// A file that is dropped anywhere on the page, or pasted, is opened as one that was chosen with the button.
function openFile(event, files) {
  const button = document.getElementById("open");
  const input = button?.parentElement.querySelector("input[type=file]");
  if (!files?.length || !button?.offsetParent || !input) return;
  event.preventDefault();
  event.stopPropagation();
  const first = new DataTransfer();
  first.items.add(files[0]);
  input.files = first.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}
for (const type of ["dragover", "drop"]) {  // captured, because the editor keeps these events to itself
  addEventListener(type, event => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();  // the browser would leave the page and show the file
    if (type === "drop") openFile(event, event.dataTransfer.files);
  }, true);
}
// Undo takes back what was painted, but not the image itself, which is first in the history of Gradio's editor.
let imageIsOpen = false;
addEventListener("click", event => {
  const [undo, redo] = [...document.querySelectorAll("#editor .icon-button-wrapper button")].slice(-3);
  if (imageIsOpen && undo?.contains(event.target)) setTimeout(() => { if (undo.disabled) redo.click(); }, 50);
}, true);
addEventListener("paste", event => openFile(event, event.clipboardData?.files), true);
</script>
"""
IMAGE_IS_OPEN = "() => { imageIsOpen = true; return []; }"
"""Runs in the browser when an image was opened."""
THEME = themes.Default(font="system-ui", font_mono="monospace").set(  # Gradio downloads fonts of other names
    button_primary_background_fill="*primary_700",  # white text has a contrast of 5.2 on it, and 2.8 on the default
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
)
