// Makes charts show the value at the pointer, touch or arrow keys, and the map show images.
// Without this script a chart's values are the browser's tooltips, and the map is static.
"use strict";
document.documentElement.classList.add("alive");

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);

function showTip(item) {
  const mark = item.querySelector("circle, .mark, .rule") || item;
  const place = mark.getBoundingClientRect();
  tip.textContent = item.dataset.tip;
  tip.hidden = false;
  const wide = document.documentElement.clientWidth;
  const left = place.left + place.width / 2 - tip.offsetWidth / 2;
  const above = place.top - tip.offsetHeight - 8;
  tip.style.left = Math.max(4, Math.min(left, wide - tip.offsetWidth - 4)) + scrollX + "px";
  tip.style.top = (above < 4 ? place.bottom + 8 : above) + scrollY + "px";
}

for (const chart of document.querySelectorAll("svg.figure")) {
  const items = [...chart.querySelectorAll("title")].map((title) => {
    const item = title.parentNode;
    item.dataset.tip = title.textContent;
    title.remove();
    return item;
  });
  if (!items.length) continue;
  let at = -1;
  const choose = (index) => {
    if (at >= 0) items[at].classList.remove("on");
    at = index;
    tip.hidden = at < 0;
    if (at < 0) return;
    items[at].classList.add("on");
    showTip(items[at]);
  };
  chart.tabIndex = 0;
  for (const kind of ["pointermove", "pointerdown"]) {
    chart.addEventListener(kind, (event) => {
      choose(items.indexOf(event.target.closest("[data-tip]")));
    });
  }
  chart.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") choose(-1);
  });
  chart.addEventListener("blur", () => choose(-1));
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (event.key === "Escape") choose(-1);
    if (!by) return;
    event.preventDefault();
    const next = at < 0 ? (by > 0 ? 0 : items.length - 1) : at + by;
    choose(Math.max(0, Math.min(next, items.length - 1)));
  });
}

const source = document.getElementById("map");
if (source) {
  const data = JSON.parse(source.textContent);
  const panel = document.querySelector(".panel");
  const maps = [...document.querySelectorAll("svg.map")].map((svg) => {
    const points = [...svg.querySelectorAll(".pt")];
    const places = points.map((point) => {
      point.querySelector("title").remove();
      const { e, f } = point.transform.baseVal[0].matrix;
      return [e, f];
    });
    const links = document.createElementNS(svg.namespaceURI, "g");
    links.setAttribute("class", "links");
    svg.append(links);
    return { svg, points, places, links };
  });

  const nameOf = (i) => (data.labels.length ? data.names[data.labels[i]] : "image " + (i + 1));
  const sameClass = (i, j) => !data.labels.length || data.labels[i] === data.labels[j];

  function thumb(i) {
    const image = document.createElement("span");
    image.className = data.pixelated ? "sprite small" : "sprite";
    image.setAttribute("role", "img");
    image.setAttribute("aria-label", nameOf(i));
    image.title = data.files[i] || nameOf(i);
    image.style.backgroundImage = 'url("' + data.sheet + '")';
    image.style.setProperty("--columns", data.columns);
    image.style.setProperty("--column", i % data.columns);
    image.style.setProperty("--row", Math.floor(i / data.columns));
    return image;
  }

  function element(tag, kind, ...children) {
    const made = document.createElement(tag);
    made.className = kind;
    made.append(...children);
    return made;
  }

  let chosen = -1;
  function choose(i) {
    if (i === chosen) return;
    chosen = i;
    for (const { points, places, links, svg } of maps) {
      links.replaceChildren();
      const add = (tag, kind, attributes) => {
        const made = document.createElementNS(svg.namespaceURI, tag);
        made.setAttribute("class", kind);
        for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
        links.append(made);
      };
      const [x, y] = places[i];
      for (const j of data.near[i]) {
        add("line", "", { x1: x, y1: y, x2: places[j][0], y2: places[j][1] });
      }
      for (const j of [...data.near[i], i]) {
        const copy = points[j].cloneNode(true);
        links.append(copy);
      }
      add("circle", "chosen", { cx: x, cy: y, r: 9 });
    }
    const hits = data.near[i].map((j, rank) => {
      const same = sameClass(i, j);
      const text = data.similarity[i][rank].toFixed(2);
      const caption = element("figcaption", "", text);
      if (!same) caption.append(element("span", "cross", " ✕ " + nameOf(j)));
      return element("figure", same ? "thumb" : "thumb wrong", thumb(j), caption);
    });
    const first = element("figure", "thumb query", thumb(i), element("figcaption", "", nameOf(i)));
    if (data.files[i]) first.append(element("p", "note", data.files[i]));
    const caption = element("p", "note", "Nearest images in this map, by cosine similarity:");
    panel.replaceChildren(first, element("div", "", caption, element("div", "hits", ...hits)));
    panel.hidden = false;
  }

  const ahead = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  for (const { svg, places } of maps) {
    svg.tabIndex = 0;
    const nearest = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let best = -1, least = (event.pointerType === "mouse" ? 12 : 28) * scale;
      places.forEach(([a, b], i) => {
        const distance = Math.hypot(a - x, b - y);
        if (distance < least) [best, least] = [i, distance];
      });
      if (best >= 0) choose(best);
    };
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("focus", () => {
      if (chosen < 0 && svg.matches(":focus-visible")) choose(0);
    });
    svg.addEventListener("keydown", (event) => {
      const way = ahead[event.key];
      if (!way) return;
      event.preventDefault();
      const [x, y] = places[Math.max(chosen, 0)];
      let best = -1, least = Infinity;
      places.forEach(([a, b], i) => {
        const along = (a - x) * way[0] + (b - y) * way[1];
        const aside = Math.abs((a - x) * way[1]) + Math.abs((b - y) * way[0]);
        if (i === chosen || along <= 0 || aside > 2 * along) return;
        if (along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
      });
      if (best >= 0) choose(best);
    });
  }
}
