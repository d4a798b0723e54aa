"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const map = data.map, classes = data.classes, K = classes.length, STEPS = 250;
  const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d"), stage = canvas.parentElement;
  const details = document.getElementById("details"), legend = document.getElementById("legend");
  const tip = stage.querySelector(".tip"), hint = stage.querySelector(".hint");

  // ---- arrays as Python wrote them: base64 of little-endian numbers
  const decoded = (text, Kind) => new Kind(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = c => `rgb(${c[0]} ${c[1]} ${c[2]})`;
  const percent = x => x >= 0.995 ? "100 %" : x >= 0.0995 ? `${Math.round(100 * x)} %` : `${(100 * x).toFixed(1)} %`;
  const number = n => n.toLocaleString("en");
  const element = (name, text, kind) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };
  // cividis, thinned: dark blue to yellow, legible without red and green
  const RAMP = [[0, 34, 78], [54, 69, 108], [102, 105, 112], [148, 142, 119], [199, 182, 103], [254, 232, 56]];
  const ramp = share => {
    const at = Math.min(RAMP.length - 1.0001, Math.max(0, share * (RAMP.length - 1))), i = Math.floor(at);
    return RAMP[i].map((v, c) => Math.round(v + (at - i) * (RAMP[i + 1][c] - v)));
  };

  // ---- what is drawn: tiles by themselves or cells of many; both give count, shares(i) and colour
  const dominant = (shares, i) => {
    let best = 0;
    for (let k = 1; k < K; k++) if (shares[i * K + k] > shares[i * K + best]) best = k;
    return best;
  };

  function Tiles() {
    const points = decoded(map.points, Float32Array), ends = decoded(map.ends, Uint32Array);
    const shares = decoded(map.shares, Uint8Array), split = decoded(map.split, Uint8Array);
    const lonlat = decoded(map.lonlat, Float32Array), valid = decoded(map.valid, Float32Array);
    const quality = decoded(map.quality, Float32Array), scene = decoded(map.scene, Uint32Array);
    const shard = decoded(map.shard, Uint16Array), record = decoded(map.record, Uint32Array);
    const day = decoded(map.day, Uint16Array), n = map.count, Q = data.quality.length;
    const boxes = new Float32Array(4 * n).fill(Infinity), best = new Uint8Array(n);
    for (let i = 0, p = 0; i < n; i++) {
      best[i] = dominant(shares, i);
      boxes[4 * i + 2] = boxes[4 * i + 3] = -Infinity;
      for (; p < ends[i]; p++) {
        const x = points[2 * p], y = points[2 * p + 1];
        if (x !== x) continue;
        boxes[4 * i] = Math.min(boxes[4 * i], x); boxes[4 * i + 1] = Math.min(boxes[4 * i + 1], y);
        boxes[4 * i + 2] = Math.max(boxes[4 * i + 2], x); boxes[4 * i + 3] = Math.max(boxes[4 * i + 3], y);
      }
    }
    const trace = i => {
      let open = false;
      for (let p = i ? ends[i - 1] : 0; p < ends[i]; p++) {
        const x = points[2 * p];
        if (x !== x) { pen.closePath(); open = false; continue; }
        const px = view.x(x + map.origin[0]), py = view.y(points[2 * p + 1] + map.origin[1]);
        if (open) pen.lineTo(px, py); else { pen.moveTo(px, py); open = true; }
      }
      pen.closePath();
    };
    const inside = (i, x, y) => {
      let odd = false, first = i ? ends[i - 1] : 0;
      for (let p = first, q = ends[i] - 1; p < ends[i]; q = p++) {
        const x1 = points[2 * p], y1 = points[2 * p + 1], x2 = points[2 * q], y2 = points[2 * q + 1];
        if ((y1 > y) !== (y2 > y) && x < (x2 - x1) * (y - y1) / (y2 - y1) + x1) odd = !odd;
      }
      return odd;
    };
    const id = i => map.ids[i].startsWith(":") ? map.scenes[scene[i]] + map.ids[i] : map.ids[i];
    return {
      draw() {
        const [x0, y0, x1, y1] = view.seen(), groups = new Map();
        for (let i = 0; i < n; i++) {
          const b = 4 * i;
          if (boxes[b] + map.origin[0] > x1 || boxes[b + 2] + map.origin[0] < x0 ||
              boxes[b + 1] + map.origin[1] > y1 || boxes[b + 3] + map.origin[1] < y0) continue;
          const colour = paint(best[i], split[i], shares[i * K + chosen] / STEPS);
          if (!groups.has(colour)) groups.set(colour, []);
          groups.get(colour).push(i);
        }
        const side = n ? (boxes[2] - boxes[0]) * view.k : 0;
        for (const [colour, members] of groups) {
          pen.beginPath();
          members.forEach(trace);
          pen.globalAlpha = 0.8; pen.fillStyle = colour; pen.fill("nonzero");
          if (side > 7) { pen.globalAlpha = 0.55; pen.strokeStyle = css("--card"); pen.lineWidth = 0.8; pen.stroke(); }
        }
        pen.globalAlpha = 1;
      },
      outline(i) { pen.beginPath(); trace(i); },
      // of tiles that overlap there, the one whose middle is nearest
      at(x, y) {
        x -= map.origin[0]; y -= map.origin[1];
        let found = -1, least = Infinity;
        for (let i = 0; i < n; i++) {
          const b = 4 * i;
          if (x < boxes[b] || x > boxes[b + 2] || y < boxes[b + 1] || y > boxes[b + 3] || !inside(i, x, y)) continue;
          const away = Math.hypot(x - (boxes[b] + boxes[b + 2]) / 2, y - (boxes[b + 1] + boxes[b + 3]) / 2);
          if (away < least) { least = away; found = i; }
        }
        return found < 0 ? null : found;
      },
      middle: i => [(boxes[4 * i] + boxes[4 * i + 2]) / 2 + map.origin[0], (boxes[4 * i + 1] + boxes[4 * i + 3]) / 2 + map.origin[1]],
      tip: i => `${classes[best[i]].name} ${percent(shares[i * K + best[i]] / STEPS)}`,
      shares: i => Array.from({ length: K }, (_, k) => shares[i * K + k] / STEPS),
      title: id,
      badges: i => [split[i] ? "val" : "train"],
      facts: i => {
        const rows = [["scene", map.scenes[scene[i]]]];
        if (map.days[day[i]]) rows.push(["date", map.days[day[i]]]);
        const [lon, lat] = [lonlat[2 * i], lonlat[2 * i + 1]];
        rows.push(["centre", `${Math.abs(lat).toFixed(4)}° ${lat < 0 ? "S" : "N"}, ${Math.abs(lon).toFixed(4)}° ${lon < 0 ? "W" : "E"}`]);
        rows.push(["labelled ground", percent(valid[i])]);
        data.quality.forEach(([name, unit], q) => {
          const value = quality[i * Q + q];
          if (value === value) rows.push([name, unit === "share" ? percent(value) : value.toFixed(0)]);
        });
        rows.push(["record", `${map.shards[shard[i]]}, ${number(record[i])}`]);
        return rows;
      },
      counts() {
        const found = new Array(K).fill(0);
        for (let i = 0; i < n; i++) found[best[i]]++;
        return found;
      },
    };
  }

  function Cells() {
    const columns = decoded(map.columns, Uint16Array), rows = decoded(map.rows, Uint16Array);
    const tiles = decoded(map.tiles, Uint32Array), shares = decoded(map.shares, Uint8Array);
    // levels of cells, each twice as wide as those of the one before
    const levels = [{ side: map.side, columns, rows, tiles, shares, count: map.count }];
    while (levels[levels.length - 1].count > 600 && levels.length < 8) levels.push(coarser(levels[levels.length - 1]));
    for (const level of levels) {
      level.best = new Uint8Array(level.count);
      level.index = new Map();
      for (let i = 0; i < level.count; i++) {
        level.best[i] = dominant(level.shares, i);
        level.index.set(level.rows[i] * 65536 + level.columns[i], i);
      }
    }
    function coarser(fine) {
      const index = new Map(), sums = [], counts = [], at = [];
      for (let i = 0; i < fine.count; i++) {
        const key = (fine.rows[i] >> 1) * 65536 + (fine.columns[i] >> 1);
        let j = index.get(key);
        if (j === undefined) {
          j = index.size; index.set(key, j); at.push([fine.columns[i] >> 1, fine.rows[i] >> 1]);
          sums.push(new Float64Array(K)); counts.push([0, 0]);
        }
        const n = fine.tiles[2 * i] + fine.tiles[2 * i + 1];
        counts[j][0] += fine.tiles[2 * i]; counts[j][1] += fine.tiles[2 * i + 1];
        for (let k = 0; k < K; k++) sums[j][k] += n * fine.shares[i * K + k];
      }
      const made = { side: 2 * fine.side, count: at.length, columns: at.map(a => a[0]), rows: at.map(a => a[1]), tiles: counts.flat() };
      made.shares = new Float32Array(K * at.length);
      for (let j = 0; j < at.length; j++) for (let k = 0; k < K; k++) made.shares[j * K + k] = sums[j][k] / (counts[j][0] + counts[j][1]);
      return made;
    }
    const level = () => levels.find(one => one.side * view.k >= 4) || levels[levels.length - 1];
    const corner = (l, i) => [map.origin[0] + l.columns[i] * l.side, map.origin[1] + l.rows[i] * l.side];
    return {
      draw() {
        const l = level(), [x0, y0, x1, y1] = view.seen(), size = l.side * view.k, gap = size > 8 ? 0.7 : 0;
        pen.globalAlpha = 0.85;
        for (let i = 0; i < l.count; i++) {
          const [x, y] = corner(l, i);
          if (x > x1 || x + l.side < x0 || y > y1 || y + l.side < y0) continue;
          const n = l.tiles[2 * i] + l.tiles[2 * i + 1];
          pen.fillStyle = paint(l.best[i], l.tiles[2 * i + 1] / n, l.shares[i * K + chosen] / STEPS);
          pen.fillRect(view.x(x), view.y(y + l.side), size - gap, size - gap);
        }
        pen.globalAlpha = 1;
      },
      outline({ l, i }) {
        const [x, y] = corner(l, i), size = l.side * view.k;
        pen.beginPath(); pen.rect(view.x(x), view.y(y + l.side), size, size);
      },
      at(x, y) {
        const l = level();
        const i = l.index.get(Math.floor((y - map.origin[1]) / l.side) * 65536 + Math.floor((x - map.origin[0]) / l.side));
        return i === undefined ? null : { l, i };
      },
      middle({ l, i }) { const [x, y] = corner(l, i); return [x + l.side / 2, y + l.side / 2]; },
      tip: ({ l, i }) => `${number(l.tiles[2 * i] + l.tiles[2 * i + 1])} tiles, ${classes[l.best[i]].name} ${percent(l.shares[i * K + l.best[i]] / STEPS)}`,
      shares: ({ l, i }) => Array.from({ length: K }, (_, k) => l.shares[i * K + k] / STEPS),
      title: ({ l, i }) => `${number(l.tiles[2 * i] + l.tiles[2 * i + 1])} tiles`,
      badges: ({ l, i }) => [...(l.tiles[2 * i] ? ["train"] : []), ...(l.tiles[2 * i + 1] ? ["val"] : [])],
      facts: ({ l, i }) => [["cell", length(l.side)], ["training", number(l.tiles[2 * i])], ["validation", number(l.tiles[2 * i + 1])]],
      counts: () => null,
    };
  }

  // ---- colours
  let colouring = "class", chosen = -1;
  const mixed = (a, b, t) => `rgb(${a.map((v, i) => Math.round(v + t * (b[i] - v))).join(" ")})`;
  const TRAIN = [47, 111, 176], VAL = [217, 115, 13];
  const palette = classes.map(c => rgb(c.rgb));
  function paint(best, val, share) {
    if (colouring === "split") return mixed(TRAIN, VAL, Math.round(val * 8) / 8);
    if (chosen >= 0) return rgb(ramp(Math.round(share * 24) / 24));
    return palette[best];
  }

  // ---- the view: metres of the plane to pixels
  const [X0, Y0, X1, Y1] = data.bounds;
  const view = {
    k: 1, cx: (X0 + X1) / 2, cy: (Y0 + Y1) / 2, w: 1, h: 1,
    x(x) { return (x - this.cx) * this.k + this.w / 2; },
    y(y) { return (this.cy - y) * this.k + this.h / 2; },
    back(px, py) { return [(px - this.w / 2) / this.k + this.cx, this.cy - (py - this.h / 2) / this.k]; },
    seen() { const [a, d] = this.back(0, 0), [c, b] = this.back(this.w, this.h); return [a, b, c, d]; },
    whole() { return Math.min((this.w - 56) / Math.max(X1 - X0, 1), (this.h - 96) / Math.max(Y1 - Y0, 1)); },
    fit() { this.k = this.whole(); this.cx = (X0 + X1) / 2; this.cy = (Y0 + Y1) / 2 + 16 / this.k; redraw(); },
    zoom(factor, px = this.w / 2, py = this.h / 2) {
      const [x, y] = this.back(px, py), least = this.whole() / 4;
      this.k = Math.min(Math.max(this.k * factor, least), 4);
      this.cx = x - (px - this.w / 2) / this.k; this.cy = y + (py - this.h / 2) / this.k;
      redraw();
    },
    pan(dx, dy) {
      this.cx = Math.min(Math.max(this.cx - dx / this.k, X0), X1); this.cy = Math.min(Math.max(this.cy + dy / this.k, Y0), Y1);
      redraw();
    },
  };
  const length = m => m >= 1000 ? `${+(m / 1000).toPrecision(3)} km` : `${+m.toPrecision(3)} m`;
  const what = map.kind === "tiles" ? Tiles() : Cells();
  let picked = null, over = null, waiting = false, picture = null;

  function redraw() {
    if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); }
  }
  function draw() {
    const ratio = devicePixelRatio || 1;
    if (canvas.width !== Math.round(view.w * ratio) || canvas.height !== Math.round(view.h * ratio)) {
      canvas.width = Math.round(view.w * ratio); canvas.height = Math.round(view.h * ratio);
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, view.w, view.h);
    if (picture && document.getElementById("base").checked) {
      const [x0, y0, x1, y1] = data.base.bounds;
      pen.imageSmoothingEnabled = (x1 - x0) * view.k < data.base.width;
      pen.globalAlpha = 0.34;
      pen.drawImage(picture, view.x(x0), view.y(y1), (x1 - x0) * view.k, (y1 - y0) * view.k);
      pen.globalAlpha = 1;
    }
    what.draw();
    for (const [item, width] of [[over, 1.5], [picked, 2.5]]) {
      if (item === null) continue;
      what.outline(item);
      pen.strokeStyle = css("--card"); pen.lineWidth = width + 2.5; pen.stroke();
      pen.strokeStyle = css("--ink"); pen.lineWidth = width; pen.stroke();
    }
    drawScale();
  }
  function drawScale() {
    const most = 130 / view.k, step = 10 ** Math.floor(Math.log10(most));
    const metres = [5, 2, 1].map(f => f * step).find(m => m <= most) || step;
    const bar = stage.querySelector(".scale span");
    bar.style.width = `${metres * view.k}px`; bar.textContent = length(metres);
  }

  // ---- details and legend
  function bars(shares) {
    const list = element("div", undefined, "bars");
    list.style.cssText = "grid-template-columns:minmax(0,1fr) 84px max-content;gap:4px 10px;font-size:13px";
    shares.map((share, k) => [share, k]).filter(([share]) => share >= 0.002).sort((a, b) => b[0] - a[0]).slice(0, 10).forEach(([share, k]) => {
      const name = element("span", undefined, "name"), chip = element("i", undefined, "chip"), track = element("div", undefined, "track"), bar = element("i");
      chip.style.background = palette[k];
      name.append(chip, element("span", classes[k].label));
      bar.style.cssText = `width:${100 * share}%;--bar:${palette[k]}`;
      track.append(bar);
      list.append(name, track, element("span", percent(share), "value"));
    });
    return list;
  }
  function pick(item) {
    picked = item;
    details.replaceChildren();
    if (item !== null) {
      const badges = element("div"), facts = element("dl");
      what.badges(item).forEach(split => { badges.append(element("span", split === "val" ? "validation" : "training", `badge ${split}`), " "); });
      what.facts(item).forEach(([name, value]) => facts.append(element("dt", name), element("dd", value)));
      details.append(element("h3", what.title(item)), badges, facts, bars(what.shares(item)));
    }
    redraw();
  }
  function drawLegend() {
    legend.replaceChildren();
    if (colouring === "split") {
      legend.append(element("h3", "Split"));
      [["training", TRAIN, data.records[0]], ["validation", VAL, data.records[1]]].forEach(([name, colour, count]) => {
        const row = element("button"), chip = element("i");
        row.type = "button"; row.style.cursor = "default"; chip.style.background = rgb(colour);
        row.append(chip, element("span", name), element("span", number(count)));
        legend.append(row);
      });
      if (map.kind === "cells") legend.append(element("p", "A cell that holds both takes a colour between the two."));
      return;
    }
    legend.append(element("h3", chosen < 0 ? "Most of the ground" : `Share of ${classes[chosen].label}`));
    if (chosen >= 0) {
      const bar = element("div", undefined, "ramp"), ends = element("div", undefined, "ends");
      bar.style.background = `linear-gradient(90deg, ${RAMP.map(rgb).join(",")})`;
      ends.append(element("span", "0 %"), element("span", "100 %"));
      legend.append(bar, ends);
    }
    classes.map((_, k) => k).sort((a, b) => classes[b].share - classes[a].share).forEach(k => {
      const entry = classes[k];
      if (!entry.share) return;
      const row = element("button"), chip = element("i");
      row.type = "button"; row.dataset.k = k; row.setAttribute("aria-pressed", chosen === k);
      row.title = `${entry.label}: colour tiles by its share`;
      chip.style.background = palette[k];
      row.append(chip, element("span", entry.label), element("span", percent(entry.share)));
      row.addEventListener("click", () => { chosen = chosen === k ? -1 : k; drawLegend(); redraw(); });
      legend.append(row);
    });
    legend.append(element("p", chosen < 0 ? "Share of all tiles' ground. Click a class to see where it lies." : "Click it again to see all classes."));
  }
  document.querySelectorAll("[data-colour]").forEach(button => button.addEventListener("click", () => {
    colouring = button.dataset.colour; chosen = -1;
    document.querySelectorAll("[data-colour]").forEach(b => b.setAttribute("aria-pressed", b === button));
    drawLegend(); redraw();
  }));
  document.querySelectorAll("[data-zoom]").forEach(button => button.addEventListener("click", () => {
    ({ in: () => view.zoom(1.8), out: () => view.zoom(1 / 1.8), all: () => view.fit() })[button.dataset.zoom]();
  }));
  document.getElementById("base").addEventListener("change", redraw);

  // ---- pointers: one drags, two pinch, a short one picks
  const pointers = new Map();
  let moved = 0, apart = 0, hinted = 0;
  const spot = event => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, spot(event)); moved = 0; apart = 0;
  });
  canvas.addEventListener("pointermove", event => {
    const [px, py] = spot(event);
    if (!pointers.has(event.pointerId)) {
      over = what.at(...view.back(px, py));
      tip.hidden = over === null;
      if (over !== null) {
        tip.textContent = what.tip(over);
        tip.style.left = `${Math.min(px + 14, view.w - tip.offsetWidth - 8)}px`; tip.style.top = `${Math.min(py + 14, view.h - tip.offsetHeight - 8)}px`;
      }
      redraw();
      return;
    }
    const [ox, oy] = pointers.get(event.pointerId);
    pointers.set(event.pointerId, [px, py]);
    tip.hidden = true;
    if (pointers.size === 1) { moved += Math.abs(px - ox) + Math.abs(py - oy); if (moved > 4) view.pan(px - ox, py - oy); return; }
    const [a, b] = [...pointers.values()], now = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (apart) view.zoom(now / apart, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    apart = now; moved = 99;
  });
  const released = event => {
    if (pointers.delete(event.pointerId) && event.type === "pointerup" && moved <= 4) pick(what.at(...view.back(...spot(event))));
    apart = 0;
  };
  canvas.addEventListener("pointerup", released);
  canvas.addEventListener("pointercancel", released);
  canvas.addEventListener("pointerleave", () => { over = null; tip.hidden = true; redraw(); });
  canvas.addEventListener("dblclick", event => view.zoom(2, ...spot(event)));
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) {
      hint.hidden = false; clearTimeout(hinted); hinted = setTimeout(() => { hint.hidden = true; }, 1200);
      return;
    }
    event.preventDefault();
    view.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), ...spot(event));
  }, { passive: false });
  canvas.addEventListener("keydown", event => {
    const act = { "+": () => view.zoom(1.5), "=": () => view.zoom(1.5), "-": () => view.zoom(1 / 1.5), 0: () => view.fit(),
      ArrowLeft: () => view.pan(60, 0), ArrowRight: () => view.pan(-60, 0), ArrowUp: () => view.pan(0, 60), ArrowDown: () => view.pan(0, -60),
      Escape: () => pick(null) }[event.key];
    if (act) { event.preventDefault(); act(); }
  });

  let shown = false;
  new ResizeObserver(() => {
    view.w = stage.clientWidth; view.h = stage.clientHeight;
    if (shown) redraw(); else { shown = true; view.fit(); }
  }).observe(stage);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  if (data.base) {
    picture = new Image();
    picture.onload = redraw;
    picture.src = data.base.png;
  } else document.querySelector(".base").hidden = true;
  drawLegend();
  // for scripts and tests: where something lies on the screen, and what is picked
  window.geokr = { view, map: what, picked: () => picked, place: item => { const [x, y] = what.middle(item); return [view.x(x), view.y(y)]; }, first: () => map.kind === "tiles" ? 0 : what.at(...firstCell()) };
  const firstCell = () => [map.origin[0] + (decoded(map.columns, Uint16Array)[0] + 0.5) * map.side, map.origin[1] + (decoded(map.rows, Uint16Array)[0] + 0.5) * map.side];
})();
