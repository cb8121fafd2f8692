import type { ASTNode } from '@marcbachmann/cel-js';

/** How much work a condition is, at most. */
export interface Weight {
  /** Steps of about a ns for each character that it reads; infinite where no such bound is known. */
  perChar: number;
  reads: ReadonlySet<string>;
}

/** Functions that walk their text once, if at all. */
const LINEAR = new Set(
  'startsWith endsWith substring trim lowerAscii upperAscii size has int uint double string bool dyn type'.split(
    ' ',
  ),
);
/** Functions that walk their text once for each character of what they look for. */
const SEARCHES = new Set(['contains', 'indexOf']);
/** Counting the code points of a text, and comparing lists and maps, takes some ns for each of them. */
const STEPS_OF_NODE = 4;

/**
 * Weighs a condition whose functions may have `prefix` before their names. Comparisons, logic, arithmetic, and searches for
 * a text that stands in the expression have a bound; macros, `matches`, and searches for what is data have none.
 */
export function weigh(root: ASTNode, prefix: string): Weight {
  const reads = new Set<string>();
  let perChar = 0;
  const pending: unknown[] = [root];
  while (pending.length > 0) {
    const next = pending.pop();
    if (Array.isArray(next)) pending.push(...(next as unknown[]));
    if (!isNode(next)) continue;
    if (next.op === 'id') reads.add(next.args);
    else if (next.op !== 'value') perChar += stepsOf(next, prefix);
    pending.push(next.args);
  }
  return { perChar, reads };
}

function stepsOf(node: ASTNode, prefix: string): number {
  if (node.op !== 'call' && node.op !== 'rcall') return STEPS_OF_NODE;
  const name = node.args[0].startsWith(prefix) ? node.args[0].slice(prefix.length) : node.args[0];
  if (LINEAR.has(name)) return STEPS_OF_NODE;
  const [sought] = node.args.slice(1).flat().slice(-1);
  const isLiteral = isNode(sought) && sought.op === 'value' && typeof sought.args === 'string';
  return SEARCHES.has(name) && isLiteral ? STEPS_OF_NODE + sought.args.length : Infinity;
}

function isNode(value: unknown): value is ASTNode {
  return typeof value === 'object' && value !== null && 'op' in value && 'args' in value;
}
