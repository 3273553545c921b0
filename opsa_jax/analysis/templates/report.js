"use strict";
(() => {
  const root = document.documentElement, toggle = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
  try { const saved = localStorage.getItem("opsa-theme"); if (saved === "dark" || saved === "light") root.dataset.theme = saved; } catch { }
  label();
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("opsa-theme", root.dataset.theme); } catch { }
    label();
  });
  document.addEventListener("click", (event) => {
    const reveal = event.target.closest(".reveal"), pick = event.target.closest(".pick button");
    if (reveal) {
      const open = reveal.parentElement.classList.toggle("open");
      reveal.setAttribute("aria-expanded", open);
      reveal.firstElementChild.textContent = open ? "hide" : reveal.dataset.label;
    }
    if (pick) {
      const box = pick.closest(".heat");
      box.dataset.pair = pick.dataset.pair;
      for (const b of box.querySelectorAll(".pick button")) b.setAttribute("aria-pressed", b === pick);
    }
  });
  const read = (event) => {
    const token = event.target.closest && event.target.closest(".tokens span");
    if (token && token.title) token.closest(".card").querySelector(".readout").textContent = token.title;
  };
  document.addEventListener("click", read);
  document.addEventListener("mouseover", read);
})();
