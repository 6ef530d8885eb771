// Keys press the buttons that say so; without this file every button still works.
"use strict";
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest("input, select, textarea")) return;
  const rows = [...document.querySelectorAll("[data-row]")];
  const here = event.target.closest("[data-row]");
  if (rows.length && (event.key === "j" || event.key === "k")) {
    const at = rows.indexOf(here);
    const next = rows[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
    return;
  }
  const buttons = (here || document).querySelectorAll("[data-key]");
  const wanted = [...buttons].find((button) =>
    button.dataset.key.split(" ").includes(event.key) && (here || !button.closest("[data-row]")));
  if (wanted) { event.preventDefault(); wanted.click(); }
});
// After a label the page comes back at its step: go on from there.
const row = location.hash && document.getElementById(location.hash.slice(1));
if (row && row.matches("[data-row]")) row.focus();
