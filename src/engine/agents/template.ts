import { z } from 'zod';
import { AppError, OutputLimitError } from '../../errors.js';
import { NO_USAGE } from '../../models/usage.js';
import { EvaluationLimitError } from '../bounds.js';
import type { MadeText } from '../evaluation.js';
import { compileTemplate, type Template } from '../templates.js';
import { toPointer } from '../validation.js';
import { agentKind, type AgentContext } from './agent.js';

/** `template`: speaks a text made from the query, the variables and earlier outputs, without a model. */
export const templateAgent = agentKind(
  z.strictObject({ template: z.string() }),
  function* (config, { pointer, faults }) {
    const template = yield* compileTemplate(config.template, {
      pointer: toPointer(pointer, 'template'),
      faults,
    });
    return (
      template && {
        async run(context) {
          const { text, letGo } = await rendered(template, context);
          try {
            if (text !== '') await context.emit(text);
          } finally {
            letGo();
          }
          return NO_USAGE;
        },
      }
    );
  },
);

/** What a template makes is what its agent says, so one that makes too much is refused as an agent that says too much. */
async function rendered(template: Template, context: AgentContext): Promise<MadeText> {
  try {
    return await template.render(context);
  } catch (error) {
    const isTooLarge =
      error instanceof AppError &&
      error.cause instanceof EvaluationLimitError &&
      error.cause.limit === 'text';
    throw isTooLarge ? new OutputLimitError('agent', error.message) : error;
  }
}
