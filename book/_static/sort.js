// A click on the head of a column sorts its table: numbers as numbers, blank cells last, a second click the other way.
addEventListener("DOMContentLoaded", () => {
  const key = (row, k) => row.cells[k].dataset.sort ?? row.cells[k].textContent.trim();
  for (const head of document.querySelectorAll("table.sortable > thead > tr > th")) {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const body = head.closest("table").tBodies[0];
      body.append(...[...body.rows].sort((one, other) => {
        const [a, b] = [key(one, head.cellIndex), key(other, head.cellIndex)];
        return !a - !b || sign * (a - b || (isNaN(a - b) ? a.localeCompare(b) : 0));
      }));
    };
  }
});
