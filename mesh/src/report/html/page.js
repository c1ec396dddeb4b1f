"use strict";
const tip = document.getElementById("tip");
document.addEventListener("mousemove", (event) => {
  const at = event.target.closest("[data-tip]");
  tip.style.display = at ? "block" : "none";
  if (!at) return;
  tip.textContent = at.dataset.tip;
  const room = (end, from, size) => Math.max(4, Math.min(from + 14, end - size - 8));
  tip.style.left = room(innerWidth, event.clientX, tip.offsetWidth) + "px";
  tip.style.top = room(innerHeight, event.clientY, tip.offsetHeight) + "px";
});
for (const input of document.querySelectorAll(".filter")) {
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of input.parentElement.querySelectorAll("tbody tr")) {
      row.hidden = !(row.textContent + row.dataset.tip).toLowerCase().includes(wanted);
    }
  });
}
document.body.dataset.ready = "yes";
