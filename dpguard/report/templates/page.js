"use strict";
// An addition: without it everything on this page can be read as well.
const all = (query, within = document) => [...within.querySelectorAll(query)];
const element = (tag, settings) => Object.assign(document.createElement(tag), settings);

// A link into a closed part opens it.
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  const part = target && target.closest("details");
  if (part && !part.open) {
    part.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", reveal);
reveal();

// One button opens or closes all policies.
const policies = all("details.policy");
const note = document.querySelector("#policies + .note");
if (note && policies.length > 1) {
  const button = element("button", { type: "button", textContent: "Open all policies" });
  button.addEventListener("click", () => {
    const open = policies.some((policy) => !policy.open);
    policies.forEach((policy) => (policy.open = open));
    button.textContent = open ? "Close all policies" : "Open all policies";
  });
  note.after(button);
}

// Paper has no closed parts.
const closed = [];
addEventListener("beforeprint", () => closed.push(...all("details:not([open])")) && closed.forEach((part) => (part.open = true)));
addEventListener("afterprint", () => closed.splice(0).forEach((part) => (part.open = false)));

// The frontier can be sorted by any column.
const key = (row, column) => {
  const text = row.cells[column].textContent.trim().replace("−", "-").replace(/,/g, "");
  if (text.startsWith("∞")) return Infinity;
  const number = parseFloat(text.replace(/^< /, ""));
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) => {
  const missing = (value) => value === "–" || value.toString().startsWith("not measured");
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return typeof a === "number" && typeof b === "number" ? (a > b) - (a < b) : String(a).localeCompare(String(b));
};
all("table.frontier").forEach((table) => {
  const heads = all("thead th", table);
  heads.forEach((head, column) => {
    const button = element("button", { type: "button", className: "sort", textContent: head.textContent });
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => (up ? compare(a, b) : compare(b, a)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
    head.replaceChildren(button);
  });
});
