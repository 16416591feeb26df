"use strict";
// Filters for the cards. Without this script the page shows every card and needs nothing else.
(() => {
  const cards = [...document.querySelectorAll(".card")];
  const texts = cards.map((card) => card.textContent.toLowerCase());
  const find = document.querySelector(".find");
  const search = document.getElementById("search");
  const concept = document.getElementById("concept");
  const outcomes = [...document.querySelectorAll("input[name=outcome]")];
  const shown = document.getElementById("shown");
  const nothing = document.getElementById("nothing");

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = new Set(outcomes.filter((box) => box.checked).map((box) => box.value));
    let count = 0;
    cards.forEach((card, i) => {
      const matched = card.dataset.matched.split(" ");
      const keep =
        chosen.has(card.dataset.outcome) &&
        (!concept.value || matched.includes(concept.value)) &&
        words.every((word) => texts[i].includes(word));
      card.hidden = !keep;
      count += keep;
    });
    shown.textContent = `${count} of ${cards.length} shown`;
    nothing.hidden = count > 0 || cards.length === 0;
  }

  search.addEventListener("input", apply);
  concept.addEventListener("change", apply);
  outcomes.forEach((box) => box.addEventListener("change", apply));
  find.hidden = false;
  apply(); // the browser may have kept a filter over a reload
})();
