/* How the search of the documentation orders what it finds. Sphinx's own weights, but: methods of groups first, and what only authors of
 * strategies and platforms read last, so that a search for all_reduce finds GroupCoordinator.all_reduce. */
var Scorer = {
  score: (result) => {
    const [page, title, , , score] = result;
    if (page.startsWith("reference/extending/")) return score - 30;
    return title.includes("GroupCoordinator.") ? score + 1 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
