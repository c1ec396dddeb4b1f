"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const tip = document.getElementById("tip");
const bytes = (n) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit + 1 < units.length) { n /= 1024; unit += 1; }
  return (unit === 0 ? n : n.toFixed(1)) + " " + units[unit];
};
const lines = (group, s) => {
  const step = group.steps[s];
  const what = step ? "step " + s + ": " + step.op + " (" + step.kind + ") of " + (step.scope || "(top)") + "\n" + step.place
    : "the end, where variables are set";
  const alive = group.values.filter((v) => v.from <= s && s <= v.to).sort((a, b) => b.bytes - a.bytes).slice(0, 6);
  return [what, bytes(group.alive[s]) + " alive, of which"]
    .concat([bytes(group.variables_bytes) + "  variables"], alive.map((v) => bytes(v.bytes) + "  " + v.name))
    .join("\n");
};
const at_step = (svg, x) => {
  const group = report.plans[svg.dataset.plan].groups[svg.dataset.group];
  const box = svg.getBoundingClientRect();
  const last = group.alive.length - 1;
  const s = Math.max(0, Math.min(last, Math.floor((x - box.left) / box.width * (last + 1))));
  const mark = svg.querySelector(".at");
  mark.setAttribute("x1", s + 0.5);
  mark.setAttribute("x2", s + 0.5);
  return lines(group, s);
};
const show = (event) => {
  const of = event.target.closest("[data-tip], svg.memory");
  tip.hidden = !of;
  if (!of) return;
  tip.textContent = of.dataset.tip || at_step(of, event.clientX);
  const below = event.clientY + 16;
  const fits = below + tip.offsetHeight + 8 < innerHeight;
  tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 12)) + "px";
  tip.style.top = (fits ? below : Math.max(4, event.clientY - tip.offsetHeight - 12)) + "px";
};
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.documentElement.addEventListener("pointerleave", () => { tip.hidden = true; });
