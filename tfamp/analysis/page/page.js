"use strict";

// Hovering over a plot shows its numbers; it saves as SVG, PNG and CSV. All of
// it is made of what the page holds: nothing is asked for.

const NEAR = 40; // Pixels.
const SHARP = 3; // Pixels of a PNG for one of the page.

function fraction(axis, value) {
  const of = axis.is_log ? Math.log : (v) => v;
  return (of(value) - of(axis.low)) / (of(axis.high) - of(axis.low));
}

/** All points of a figure, with their place in the picture shown now. */
function pointsOf(panels, boxes) {
  const points = [];
  panels.forEach((panel, number) => {
    const [left, top, width, height] = boxes[number];
    for (const series of panel.series) {
      series.x.forEach((x, i) => {
        const y = series.y[i];
        const at = "at" in series ? series.at : y;
        if (x === null || y === null) return;
        const px = left + width * fraction(panel.x, x);
        const py = top + height * (1 - fraction(panel.y, at));
        const inside = px >= left - 1 && px <= left + width + 1 &&
          py >= top - 1 && py <= top + height + 1;
        if (inside) points.push({ panel, series, x, y, px, py });
      });
    }
  });
  return points;
}

function named(axis, value) {
  const found = (axis.names || []).find(([at]) => at === value);
  return found ? found[1] : String(value);
}

function said(point) {
  const { panel, series, x, y } = point;
  const image = "at" in series;
  const across = `${panel.x.label || "x"} ${named(panel.x, x)}`;
  const up = image ? String(y) : named(panel.y, y);
  const lines = [panel.title, series.label, across];
  lines.push(`${(!image && panel.y.label) || "value"} ${up}`);
  return lines.filter(Boolean).join("\n");
}

function quoted(cell) {
  const text = cell === null ? "" : String(cell);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv(panels) {
  const rows = [["panel", "series", "x_label", "x", "y_label", "y"]];
  for (const panel of panels) {
    for (const series of panel.series) {
      series.x.forEach((x, i) => {
        const y = series.y[i];
        const up = "at" in series || y === null ? y : named(panel.y, y);
        const across = x === null ? x : named(panel.x, x);
        const place = [panel.title, series.label, panel.x.label, across];
        rows.push([...place, panel.y.label, up]);
      });
    }
  }
  return rows.map((row) => row.map(quoted).join(",") + "\r\n").join("");
}

function save(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

function saveText(text, type, name) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  save(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function svgText(svg) {
  const copy = svg.cloneNode(true);
  copy.querySelectorAll(".seen").forEach((each) => each.remove());
  const { width, height } = svg.viewBox.baseVal;
  copy.setAttribute("width", `${width}pt`);
  copy.setAttribute("height", `${height}pt`);
  return new XMLSerializer().serializeToString(copy);
}

function savePng(svg, name) {
  const { width, height } = svg.viewBox.baseVal;
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = Math.round(width * SHARP);
    canvas.height = Math.round(height * SHARP);
    const context = canvas.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    save(canvas.toDataURL("image/png"), name);
  };
  const text = encodeURIComponent(svgText(svg));
  image.src = `data:image/svg+xml;charset=utf-8,${text}`;
}

function wake(figure) {
  const shown = JSON.parse(figure.dataset.values);
  const name = figure.dataset.name;
  const pictures = [...figure.querySelectorAll("svg.picture")];
  const current = () =>
    pictures.find((svg) => svg.getBoundingClientRect().width) || pictures[0];
  const points = new Map(
    pictures.map((svg) => {
      const narrow = svg.classList.contains("phone");
      const boxes = narrow ? shown.narrow_boxes : shown.boxes;
      return [svg, pointsOf(shown.panels, boxes)];
    }),
  );

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  const plot = figure.querySelector(".plot");
  figure.append(tip);
  const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  dot.setAttribute("class", "seen");
  dot.setAttribute("r", "4");

  let index = -1;
  function show(svg, number) {
    index = number;
    const point = points.get(svg)[number];
    if (!point) {
      tip.hidden = true;
      dot.remove();
      return;
    }
    dot.setAttribute("cx", point.px);
    dot.setAttribute("cy", point.py);
    svg.append(dot);
    tip.textContent = said(point);
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const outer = figure.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const x = box.left - outer.left + point.px * scale;
    const y = box.top - outer.top + point.py * scale;
    const room = outer.width - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 12, room))}px`;
    tip.style.top = `${Math.max(8, y - tip.offsetHeight - 10)}px`;
  }

  function nearest(event) {
    const svg = current();
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    let best = -1;
    let least = NEAR;
    points.get(svg).forEach((point, i) => {
      const x = box.left + point.px * scale - event.clientX;
      const y = box.top + point.py * scale - event.clientY;
      const distance = Math.hypot(x, y);
      if (distance < least) [least, best] = [distance, i];
    });
    show(svg, best);
  }

  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("pointerleave", () => show(current(), -1));
  plot.addEventListener("blur", () => show(current(), -1));
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const last = points.get(current()).length - 1;
    if (!step || last < 0) return;
    event.preventDefault();
    show(current(), Math.max(0, Math.min(last, index + step)));
  });

  const buttons = document.createElement("div");
  buttons.className = "save";
  const kinds = {
    SVG: () => saveText(svgText(pictures[0]), "image/svg+xml", `${name}.svg`),
    PNG: () => savePng(pictures[0], `${name}.png`),
    CSV: () => saveText(csv(shown.panels), "text/csv", `${name}.csv`),
  };
  for (const [kind, press] of Object.entries(kinds)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind;
    button.setAttribute("aria-label", `Save ${name} as ${kind}`);
    button.addEventListener("click", press);
    buttons.append(button);
  }
  figure.append(buttons);
}

document.querySelectorAll("figure[data-values]").forEach(wake);
