/** Tokens as the provider counted them; 0 where it said nothing. */
export interface ModelUsage {
  input_tokens: number;
  output_tokens: number;
}

/** As much as an integer column keeps, whatever a provider has counted. */
const MOST_TOKENS = 2_147_483_647;

export const NO_USAGE: ModelUsage = { input_tokens: 0, output_tokens: 0 };

export function addUsage(sum: ModelUsage, { input_tokens, output_tokens }: ModelUsage): ModelUsage {
  return {
    input_tokens: keptTokens(sum.input_tokens + input_tokens),
    output_tokens: keptTokens(sum.output_tokens + output_tokens),
  };
}

/** A count of tokens as it is kept; 0 for what is none. */
export function keptTokens(tokens: number): number {
  return Number.isNaN(tokens) ? 0 : Math.min(Math.max(0, Math.round(tokens)), MOST_TOKENS);
}
