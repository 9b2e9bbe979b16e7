// A click on the head of a table of the class `sortable` sorts its rows.
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column, heads) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = new Intl.Collator("en", { numeric: true });
      const keyed = [...table.tBodies[0].rows].map(row => [row.cells[column].dataset.sort ?? row.cells[column].textContent.trim(), row]);
      const numbers = keyed.every(([key]) => key !== "" && !Number.isNaN(Number(key)));
      keyed.sort(([a], [b]) => (down ? -1 : 1) * (numbers ? Number(a) - Number(b) : order.compare(a, b)));
      table.tBodies[0].append(...keyed.map(([, row]) => row));
    });
  });
}
