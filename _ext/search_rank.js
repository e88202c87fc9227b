// 全文搜索的查询与排序：不碰页面，所以浏览器和测试都能直接用。由 site_search.py 复制到网站的 _static/search/，
// 读者打开搜索时才下载，连同那里的 index.json（各节的文字与词表）。
//
// 一次查询：整理（全角、繁体、大小写）→ 换成本书的用词 → 切成词 → 在每一节的标题和正文里按原样比对，排出先后：
// 标题就是所查的在前，其次是所查的词连在一起的，再次是各词散在一节里的。没有一节含有所有的词时，先看是不是打错了字。

// 问句里常见、不影响找什么的词
const STOP = new Set(("的 了 吗 呢 是 什么 怎么 怎样 如何 为什么 为何 哪些 哪里 请问 一下 有 在 和 与 及 中 里 "
  + "a an the of in on to for and or is are how what why with do does i").split(" "));
// 这些节把全章提到的都复述一遍，不是讲它的地方
const RECAP = /概述|小结|勘误|延伸阅读|练习/;

// ---------- 文字 ----------

export const han = /\p{Script=Han}/u;
const letter = /[\p{L}\p{N}]/u;
const squeeze = text => text.normalize("NFKC").toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
// “扩散模型-退化过程”“实战：反转”里，真正的题目是后一半
const topic = title => title.replace(/^(第.{1,3}章|[\d.]+)\s*/, "").replace(/^(扩散模型-|实战：)/, "");
// 标题里单独也能查的各部分：“调度器（Scheduler）”“UNet 模型”
const topicParts = title => {
  const bare = topic(title).replace(/（.*?）/g, "");
  return [...topic(title).split(/[-—：（）、，\s]/), ...bare.split(/[-—：、，]/)].map(squeeze).filter(Boolean);
};

// 全角、繁体换成半角、简体
const tidy = (query, traditional) =>
  [...query.normalize("NFKC")].map(c => traditional[c] ?? c).join("").replace(/\s+/g, " ").trim();

// “什么是退化过程？”→“退化过程”
const withoutAsking = query => query
  .replace(/^(请问|什么是|什么叫|如何|怎么|怎样|为什么|what is|what are|how to|how do i) ?/i, "").replace(/^(a|an|the) /i, "")
  .replace(/(是什么|有什么用|怎么用|怎么办|吗|呢)?[?？!！。.]*$/, "") || query;

const escapeRegExp = text => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

// 别的说法 → 本书的用词，长的先换
const replacements = same => same.flatMap(([ours, ...others]) => others.map(other => [other, ours]))
  .sort((a, b) => b[0].length - a[0].length)
  .map(([other, ours]) => {
    const pattern = escapeRegExp(other).replace(/[\s-]/g, "[\\s-]?"), chinese = han.test(other);
    return {ours, chinese, other: new RegExp(chinese ? pattern : `(^|[^a-z0-9_])${pattern}(?![a-z0-9_])`, "gi")};
  });

// 把查询里别的说法换成本书的用词
function inBookWords(query, pairs) {
  let result = query;
  for (const {ours, chinese, other} of pairs) {
    if (!chinese) result = result.replace(other, `$1 ${ours} `);
    else if (!result.includes(ours)) result = result.replace(other, ` ${ours} `);
  }
  return result.replace(/\s+/g, " ").trim();
}

const segmenter = globalThis.Intl?.Segmenter && new Intl.Segmenter("zh", {granularity: "word"});

// 切成词。汉字用浏览器自带的词典；西文、数字、标识符在标点处断开
function words(query) {
  const pieces = query.toLowerCase().match(/\p{Script=Han}+|[^\s\p{Script=Han}]+/gu) ?? [];
  const found = pieces.flatMap(piece => {
    if (!han.test(piece)) return piece.match(/[\p{L}\p{N}]+/gu) ?? [];
    return segmenter ? [...segmenter.segment(piece)].map(part => part.segment) : piece.match(/..?/gu);
  });
  const useful = found.filter(word => !STOP.has(word));
  return [...new Set(useful.length ? useful : found)];
}

// at 处是不是一个词的开头：免得 unte 在 encounter 里也算找到。驼峰写法的每一段、汉字后面的西文也是词的开头
function startsWord(text, at) {
  const before = text[at - 1] ?? " ";
  return !letter.test(before) || han.test(before) || (/[a-z\d]/.test(before) && /[A-Z]/.test(text[at]));
}

// term（小写）在一段文字里出现的各处；西文从一个词的开头比起
function places({text, lower}, term, limit = 200) {
  const found = [], latin = !han.test(term);
  for (let at = lower.indexOf(term); at >= 0 && found.length < limit; at = lower.indexOf(term, at + term.length)) {
    if (!latin || startsWord(text, at)) found.push(at);
  }
  return found;
}

const searchable = text => ({text, lower: text.toLowerCase()});
const contains = (piece, term) => places(piece, term, 1).length > 0;

// 整个查询连在一起的写法（小写）：字之间可以隔着空格、连字符、下划线，不能隔着断句的标点
function phrasePattern(query) {
  const letters = [...squeeze(query)].map(escapeRegExp);
  return {first: letters[0], rest: new RegExp(letters.join("[^\\p{L}\\p{N}\\n。，、；：！？（）]{0,2}"), "uy")};
}

// 整个查询在一段文字里出现的各处
function phrasePlaces(piece, {first, rest}) {
  return places(piece, first, Infinity).filter(at => {
    rest.lastIndex = at;
    return rest.test(piece.lower);
  });
}

// 各词挨得有多近：含有每个词的最短一段里，词占了几成；1 是连在一起
function closeness(terms, positions) {
  const all = positions.flatMap((list, i) => list.map(at => [at, i])).sort((a, b) => a[0] - b[0]);
  const seen = terms.map(() => 0), total = terms.reduce((sum, term) => sum + term.length, 0);
  let missing = terms.length, from = 0, best = Infinity;
  for (const [at, i] of all) {
    if (seen[i]++ === 0) missing -= 1;
    while (missing === 0) {
      best = Math.min(best, at + terms[i].length - all[from][0]);
      if (--seen[all[from][1]] === 0) missing += 1;
      from += 1;
    }
  }
  return Math.min(1, total / best);
}

// ---------- 打错的字 ----------

// 相邻两字母颠倒只算一处错
function distance(a, b) {
  const rows = [...Array(a.length + 1)].map((_, i) => [i]);
  for (let j = 0; j <= b.length; j++) rows[0][j] = j;
  for (let i = 1; i <= a.length; i++) for (let j = 1; j <= b.length; j++) {
    rows[i][j] = Math.min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (a[i - 1] !== b[j - 1]));
    if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
      rows[i][j] = Math.min(rows[i][j], rows[i - 2][j - 2] + 1);
    }
  }
  return rows[a.length][b.length];
}

// 词表里与它最像的词；差得太多就没有
function nearest(text, vocabulary) {
  const wanted = squeeze(text);
  const allowed = wanted.length < 2 ? 0 : wanted.length < 6 ? 1 : 2;
  let best = null, least = allowed + 1;
  for (const [word, candidate] of vocabulary) {
    if (candidate === wanted || Math.abs(candidate.length - wanted.length) > allowed) continue;
    if (candidate.length < 3 && !han.test(candidate)) continue;
    const far = distance(wanted, candidate);
    if (far < least) [best, least] = [word, far];
  }
  return best;
}

// 整个查询，或其中一段，改成词表里的词
function corrected(query, vocabulary) {
  const whole = nearest(query, vocabulary);
  if (whole) return whole;
  const known = new Set(vocabulary.map(([, candidate]) => candidate));
  const pieces = query.match(/\p{Script=Han}+|[^\s\p{Script=Han}]+/gu) ?? [];
  const fixed = pieces.map(piece => (known.has(squeeze(piece)) ? null : nearest(piece, vocabulary)) ?? piece);
  return fixed.some((piece, i) => piece !== pieces[i]) ? fixed.join(" ") : null;
}

// ---------- 排序 ----------

// 一节里每次查询都要用的样子，打开搜索时算一次
function prepare(record, order) {
  const body = `${record.prose}\n${record.code}`, bare = topic(record.title).replace(/（.*?）/g, "");
  return {
    ...record, order,
    head: searchable(record.title), body: searchable(body), around: searchable(`${record.above} ${record.page}`),
    squeezed: squeeze(body), defined: record.defines.map(squeeze),
    names: {
      title: squeeze(record.title), topic: squeeze(topic(record.title)), bare: squeeze(bare), parts: topicParts(record.title),
      number: record.title.match(/^[\d.]+|^第.{1,3}章/)?.[0],
    },
  };
}

// 一节有多合用：先看标题是不是所查的，再看正文；标题越合，正文越不要紧
function rate(record, {query, asked, terms, pattern, rarity}) {
  const {title, bare, parts, number} = record.names;
  const positions = terms.map(term => places(record.body, term));
  const inHead = terms.map(term => contains(record.head, term));
  const share = (has, weights) => terms.reduce((sum, _, i) => sum + (has(i) ? weights[i] : 0), 0)
    / (weights.reduce((sum, weight) => sum + weight, 0) || 1);

  let heading = 40 * share(i => inHead[i], rarity) ** 2;
  if (query === number || [title, record.names.topic, bare].includes(asked)) heading = 118;
  else if (record.kind === "term" && parts.includes(asked)) heading = 112;
  else if (record.defined.includes(asked)) heading = 100;
  else if (parts.includes(asked)) heading = 85 + 8 * asked.length / bare.length;
  else if (title.includes(asked)) heading = 70 + 15 * asked.length / title.length + (bare.startsWith(asked) ? 5 : 0);

  // 单个字母到处都有，含不含它说明不了什么
  const even = terms.map(term => han.test(term) || term.length > 1 ? 1 : .2);
  const own = i => inHead[i] || positions[i].length > 0;
  const phrase = terms.length === 1 && terms[0] === asked ? positions[0]
    : record.squeezed.includes(asked) ? phrasePlaces(record.body, pattern) : [];
  const inProse = list => list.filter(at => at < record.prose.length).length;
  // 代码里的不如正文里的要紧；长的节里多出现几次也平常
  const long = 1 + record.body.text.length / 1000;
  const times = (.7 * inProse(phrase) + .3 * phrase.length) / long;
  // 标题或整个查询已经合了，就不必再逐词核对：“U-Net”与“UNet”切出的词不同
  const covered = heading >= 70 || times ? 1
    : share(own, even) && share(i => own(i) || contains(record.around, terms[i]), even);
  const often = terms.reduce((sum, _, i) => {
    const count = positions[i].length;
    return sum + rarity[i] * count / (count + long);
  }, 0) / rarity.reduce((sum, weight) => sum + weight, 0);
  const near = terms.length > 1 && times ? 1 : terms.length > 1 && positions.every(list => list.length) ? closeness(terms, positions) : 0;

  let body = 20 * covered ** 2 + 6 * often + 36 * near ** 2 + (times ? 12 + 5 * Math.log2(1 + times) : 0);
  if (RECAP.test(record.title)) body *= .7;
  if (record.kind === "aside") body *= .5;

  const level = record.kind === "term" || /^\d+\.\d+\.\d/.test(number) ? 0 : record.title === record.page ? 10 : 6;
  let score = heading + body;
  if (heading >= 70) score = heading + level + body / 5;
  if (heading >= 112) score = heading + level - record.order / 1000;      // 几章都有的标题，在前的优先
  // 分三档：标题合了，词连在一起，词散在各处。文献里的词只作补充，除非查的就是它的题名
  const citation = record.kind === "citation";
  const tier = heading >= (citation ? 118 : 70) ? 2 : times && !citation ? 1 : 0;
  return {record, covered, tier, score: citation ? score / 6 : score};
}

const better = (a, b) => b.tier - a.tier || b.score - a.score;

/** 由 index.json 的内容造出查询用的函数：search(一句话) → {results, marks, instead, partial}。 */
export function createSearch({records: raw, same, words: vocabulary, traditional}) {
  const records = raw.map(prepare);
  const pairs = replacements(same);
  const known = vocabulary.map(word => [word, squeeze(word)]);

  function findOnce(query) {
    const terms = words(query), asked = squeeze(query);
    if (!terms.length) return [];
    // 稀罕的词更要紧
    const rarity = terms.map(term => 1 / Math.log2(2 + records.filter(({head, body}) => contains(head, term) || contains(body, term)).length));
    const pattern = phrasePattern(query);
    return records.map(record => rate(record, {query, asked, terms, pattern, rarity})).filter(({covered}) => covered);
  }

  // 原样、去掉问话、换成本书的说法，各查一遍，同一节取高的
  function find(query) {
    const asked = withoutAsking(query);
    const variants = [...new Set([query, asked, inBookWords(asked, pairs)].map(text => text.toLowerCase()))];
    const best = new Map();
    for (const variant of variants) for (const found of findOnce(variant)) {
      const old = best.get(found.record);
      if (!old || better(old, found) > 0) best.set(found.record, found);
    }
    const all = [...best.values()].sort(better);
    const complete = all.filter(({covered}) => covered > .999);
    return {
      results: complete.length ? complete : all.filter(({covered}) => covered >= .5),
      complete: complete.length > 0,
      marks: [...new Set(variants.flatMap(variant => [variant, ...words(variant)]))],
    };
  }

  // 返回结果，以及要对读者说的话：instead 是改正后的查询，partial 表示没有一节含有所有的词
  return function search(text) {
    const query = tidy(text, traditional), answer = find(query), last = words(query).at(-1) ?? "";
    // 只碰上文献里某个更长的人名，多半也是打错了字
    const whole = new RegExp(`(^|[^\\p{L}\\p{N}])${escapeRegExp(last)}(?![\\p{L}\\p{N}])`, "iu");
    const chance = answer.results.every(({record}) => record.kind === "citation" && !whole.test(record.body.text));
    if (!answer.complete || chance) {
      const instead = corrected(query, known), improved = instead && find(instead);
      if (improved?.complete) return {...improved, instead};
    }
    return {...answer, partial: !answer.complete};
  };
}
