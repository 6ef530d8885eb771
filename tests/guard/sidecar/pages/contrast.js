// WCAG 2: contrast of every text that is seen, against the nearest background behind it.
() => {
  const parse = (c) => c.match(/[\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => rgb.reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !e.checkVisibility() || e.closest(".skip, svg")) continue;
    let behind = e, fade = 1;
    for (let f = e; f; f = f.parentElement) fade *= Number(getComputedStyle(f).opacity);
    while (behind && (parse(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const back = parse(getComputedStyle(behind ?? document.body).backgroundColor).slice(0, 3);
    const ink = parse(getComputedStyle(e).color).slice(0, 3).map((v, i) => fade * v + (1 - fade) * back[i]);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${e.className} ${e.textContent.trim().slice(0, 30)}`);
  }
  return [...new Set(poor)];
}
