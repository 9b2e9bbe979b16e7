// Filters of tables, and the view of code: #code=MODULE/ADDRESS, with the id's prefix of its sections.
{
const get = id => document.getElementById(id);
for (const input of document.querySelectorAll("[data-filter]")) {
  const id = input.dataset.filter, choice = document.querySelector(`[data-choose="${id}"]`);
  const rows = [...get(id).tBodies[0].rows].map(row => [row, row.textContent.toLowerCase(), (row.dataset.kind ?? "").split(" ")]);
  const choose = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text, kinds] of rows) {
      row.hidden = !(words.every(word => text.includes(word)) && (!choice.value || kinds.includes(choice.value)));
      shown += !row.hidden;
    }
    document.querySelector(`[data-shown="${id}"]`).textContent = `${shown} of ${rows.length}`;
  };
  input.addEventListener("input", choose);
  choice.addEventListener("input", choose);
  choose();
}
// ---- code: unpacked when it is first asked for
const unpacked = {};
async function data(prefix) {
  if (!unpacked[prefix]) {
    const bytes = Uint8Array.from(atob(get(`${prefix}data`).textContent), letter => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked[prefix] = JSON.parse(await new Response(stream).text());
  }
  return unpacked[prefix];
}
const MARKS = ["○", "◐", "●"];
const TITLES = [["never ran", "", "ran"], ["never ran", "ran only under faults", "ran without faults"]];
let titles = TITLES[0];
const view = get("view"), code = get("code");
let preferred = "source";
const LINK = /^#(c\d+-|)(code|file)=([^/]+)(?:\/([0-9a-f]+))?(?:\/([0-9a-f]+))?$/;
function row(number, text, reach) {
  const line = document.createElement("div"), gutter = document.createElement("b"), mark = document.createElement("em");
  gutter.textContent = number;
  if (reach !== undefined) { line.className = `r${reach}`; line.title = titles[reach]; mark.textContent = MARKS[reach]; }
  line.append(gutter, mark, text);
  return line;
}
function where(text) {
  const line = document.createElement("div");
  line.className = "where";
  line.textContent = text;
  return line;
}
function sourceRows(file, first, last) {
  const [, text, reaches] = file, rows = [];
  for (let n = first; n <= Math.min(last, text.length); n++) rows.push([n, row(n, text[n - 1], reaches[n])]);
  return rows;
}
async function show() {
  const found = LINK.exec(location.hash);
  if (!found || !get(`${found[1]}data`)) { if (view.open) view.close(); return; }
  const { files, functions, faults } = await data(found[1]), name = decodeURIComponent(found[3]);
  titles = TITLES[Number(faults)];
  let title, full = "", rows = [], at, begin = 0, has = false;
  if (found[2] === "file") {
    const file = files[Number(name)];
    if (!file) return;
    title = file[0];
    at = Number.parseInt(found[4], 16) || 0;
    rows = file[1] ? sourceRows(file, 1, file[1].length)
      : Object.entries(file[2]).map(([n, reach]) => [Number(n), row(n, "", reach)]);
    if (!file[1]) rows.unshift([0, where("This file was not found, or is too large: only the numbers of its lines are known.")]);
  } else {
    const one = functions[`${name}/${found[4]}`];
    const [called, home, first, last, instructions] = one ?? [found[4], null, 0, 0, []];
    if (!one) rows.push([0, where("This page has no code of this function, as it would be too large.")]);
    title = `${called} (${name})`;
    has = home !== null && files[home][1] !== null;
    at = found[5] ? Number.parseInt(found[5], 16) : 0;
    if (has && preferred === "source") {
      title += `, ${files[home][0].split("/").pop()}`;
      full = files[home][0];
      const of = instructions.find(([address, , , file]) => address === at && file === home);
      at = of ? of[4] : 0;
      begin = instructions[0][4];  // what is inlined may come before it
      rows = sourceRows(files[home], Math.max(first - 3, 1), last + 2);
    } else {
      let before = "";
      for (const [address, text, reach, file, line] of instructions) {
        const place = file < 0 ? "" : `${files[file][0]}:${line}`;
        if (place && place !== before) rows.push([-1, where(`${place}  ${files[file][1]?.[line - 1]?.trim() ?? ""}`)]);
        before = place;
        rows.push([address, row(address.toString(16), text, reach)]);
      }
    }
  }
  get("view-title").textContent = title;
  get("view-title").title = full;
  for (const which of ["source", "instructions"]) {
    get(`as-${which}`).hidden = !has;
    get(`as-${which}`).setAttribute("aria-pressed", String(preferred === which));
  }
  code.replaceChildren(...rows.map(([, line]) => line));
  if (!view.open) view.showModal();
  view.scrollTop = 0;
  const here = at && rows.find(([n]) => n === at);
  if (here) { here[1].classList.add("here"); here[1].scrollIntoView({ block: "center" }); }
  else if (begin) rows.find(([n]) => n === Math.max(begin - 3, rows[0][0]))?.[1].scrollIntoView();
}
for (const which of ["source", "instructions"]) get(`as-${which}`).addEventListener("click", () => { preferred = which; show(); });
get("close").addEventListener("click", () => view.close());
view.addEventListener("click", event => { if (event.target === view) view.close(); });
view.addEventListener("close", () => { if (LINK.test(location.hash)) history.replaceState(null, "", location.pathname + location.search); });
addEventListener("hashchange", show);
show();
}
