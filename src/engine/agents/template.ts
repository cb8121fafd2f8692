import { z } from 'zod';
import { compileTemplate } from '../templates.js';
import { toPointer } from '../validation.js';
import { agentKind } from './agent.js';

/** `template`: speaks a text made from the query, the variables and earlier outputs, without a model. */
export const templateAgent = agentKind(
  z.strictObject({ template: z.string() }),
  (config, { pointer, faults }) => {
    const template = compileTemplate(config.template, { pointer: toPointer(pointer, 'template'), faults });
    return (
      template && {
        async run(context) {
          const text = await template.render(context);
          if (text !== '') await context.emit(text);
          return { input_tokens: 0, output_tokens: 0 };
        },
      }
    );
  },
);
