// What axe-core's rules for forms, names, headings and landmarks come down to on pages like these.
() => {
  const wrong = [];
  const named = (e) => e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim();
  if (!document.documentElement.lang) wrong.push("no lang");
  if (!document.title.trim()) wrong.push("no title");
  if (document.querySelectorAll("main").length !== 1) wrong.push("not one main");
  if (document.querySelectorAll("h1").length !== 1) wrong.push("not one h1");
  for (const e of document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a[href], summary"))
    if (!named(e)) wrong.push("no name: " + e.outerHTML.slice(0, 80));
  for (const e of document.querySelectorAll("nav, [role=region], [data-row]"))
    if (!e.getAttribute("aria-label")) wrong.push("no label: " + e.outerHTML.slice(0, 80));
  for (const e of document.querySelectorAll("[aria-labelledby]"))
    if (!document.getElementById(e.getAttribute("aria-labelledby"))) wrong.push("labelled by nothing: " + e.outerHTML);
  for (const e of document.querySelectorAll("th")) if (!e.scope) wrong.push("no scope: " + e.outerHTML);
  for (const e of document.querySelectorAll("[role=img]")) if (!named(e)) wrong.push("no name: svg");
  for (const e of document.querySelectorAll("[tabindex]")) if (e.tabIndex > 0) wrong.push("tab order: " + e.outerHTML);
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((x) => x === id).length > 1) wrong.push("twice: " + id);
  let level = 0;
  for (const e of document.querySelectorAll("h1, h2, h3")) {
    if (Number(e.tagName[1]) > level + 1) wrong.push("skips a heading: " + e.textContent);
    level = Number(e.tagName[1]);
  }
  return wrong;
}
