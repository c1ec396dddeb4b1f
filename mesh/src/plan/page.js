
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
for (const svg of document.querySelectorAll("svg.memory")) {
  const group = report.plans[svg.dataset.plan].groups[svg.dataset.group];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const last = group.alive.length - 1;
    const s = Math.max(0, Math.min(last, Math.floor((event.clientX - box.left) / box.width * (last + 1))));
    tip.textContent = lines(group, s);
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 12, Math.max(0, innerWidth - tip.offsetWidth - 12)) + "px";
    tip.style.top = (event.clientY + 16) + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
