"use strict";
/* Values under the pointer or the arrow keys; folded parts opened for print; a page that is written again
   reloads itself and keeps its place. Everything is readable without this. */
(() => {
  const near = (places, at) => {
    let low = 0, high = places.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (places[middle] < at) low = middle; else high = middle;
    }
    return Math.abs(places[low] - at) <= Math.abs(places[high] - at) ? low : high;
  };
  const shown = (value, share) => {
    if (value === null) return "–";
    if (share) return (value * 100).toFixed(1) + "%";
    return Math.abs(value) >= 1e4 ? value.toLocaleString("en") : String(value);
  };
  for (const figure of document.querySelectorAll("figure.chart")) {
    const plot = figure.querySelector(".plot"), source = figure.querySelector("script.values");
    if (!plot || !source) continue;
    const values = JSON.parse(source.textContent);
    if (!values.x.length) continue;
    let cursor = null, box = null, index = values.x.length - 1;
    const show = (chosen) => {
      index = Math.max(0, Math.min(values.x.length - 1, chosen));
      if (!cursor) {
        cursor = plot.appendChild(document.createElement("div"));
        cursor.className = "cursor";
        box = plot.appendChild(document.createElement("div"));
        box.className = "read";
        box.setAttribute("role", "status");
      }
      const at = values.x[index];
      cursor.style.left = at * 100 + "%";
      box.style.left = at < 0.5 ? `calc(${at * 100}% + 10px)` : "auto";
      box.style.right = at < 0.5 ? "auto" : `calc(${(1 - at) * 100}% + 10px)`;
      box.replaceChildren();
      const line = (name, value) => {
        const row = box.appendChild(document.createElement("div"));
        if (value !== undefined) row.appendChild(document.createElement("b")).textContent = value;
        row.append(name);
      };
      line(values.at[index] + " tokens");
      for (const curve of values.curves) line(curve.name, shown(curve.y[index], values.share));
    };
    const hide = () => {
      if (cursor) { cursor.remove(); box.remove(); cursor = box = null; }
    };
    plot.tabIndex = 0;
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", figure.querySelector("figcaption").textContent + ": arrow keys read out values");
    plot.addEventListener("pointermove", (event) => {
      const frame = plot.getBoundingClientRect();
      show(near(values.x, (event.clientX - frame.left) / frame.width));
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(index); });
    plot.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(values.x.length / 20));
      const to = { ArrowLeft: index - 1, ArrowRight: index + 1, PageDown: index - far, PageUp: index + far,
        Home: 0, End: values.x.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });

  const key = "x1-report " + location.pathname;
  const folds = () => { // each with a name that stays when others come before it
    const seen = {};
    return [...document.querySelectorAll("details")].map((one) => {
      const part = one.closest("section")?.id + " " + one.firstChild.textContent;
      return [part + " " + (seen[part] = (seen[part] || 0) + 1), one];
    });
  };
  const choices = () => [...document.querySelectorAll("input[type=radio]")];
  try {
    const kept = JSON.parse(sessionStorage.getItem(key) || "null");
    sessionStorage.removeItem(key);
    if (kept) {
      const titles = new Set(kept.open);
      folds().forEach(([name, one]) => { if (titles.has(name)) one.open = true; });
      choices().forEach((one) => { if (kept.chosen.includes(one.id)) one.checked = true; });
      document.documentElement.style.scrollBehavior = "auto";
      scrollTo(0, kept.y);
    }
  } catch { /* a browser that keeps nothing: the page begins at its top */ }
  const every = Number(document.documentElement.dataset.refresh);
  if (every > 0) setTimeout(() => {
    try {
      sessionStorage.setItem(key, JSON.stringify({
        y: scrollY,
        open: folds().filter(([, one]) => one.open).map(([name]) => name),
        chosen: choices().filter((one) => one.checked).map((one) => one.id),
      }));
    } catch { /* as above */ }
    location.reload();
  }, every * 1000);
})();
