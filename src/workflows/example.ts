/** The id under which the example is seeded, so that the addresses in the API's documentation can be tried. */
export const supportDeskId = '01900000-0000-7000-8000-000000000001';

/** The request speaks of money; with a real model, the word that `triage` answers decides too. */
const IS_BILLING = 'query.lowerAscii().contains("invoice") || output.lowerAscii().startsWith("billing")';

/**
 * A support desk: one agent sorts the request, one of two specialists answers it, an editor makes the reply of it. It
 * needs no key and no network; with another `model` it is a real one.
 */
export const supportDesk = {
  name: 'support-desk',
  description: 'Sorts a request, lets the right specialist answer it, and edits the reply.',
  configuration: {
    agents: [
      {
        agent_id: 'triage',
        agent_type: 'llm',
        name: 'Triage',
        position: { x: 0, y: 120 },
        config: {
          model: 'offline/echo',
          system_prompt: 'Say in one word what the request is about: billing or technical.',
          streaming: false,
        },
      },
      {
        agent_id: 'billing',
        agent_type: 'llm',
        name: 'Billing specialist',
        position: { x: 320, y: 0 },
        config: {
          model: 'offline/echo',
          system_prompt: 'You know prices, payments and refunds. Answer the request.',
        },
      },
      {
        agent_id: 'technical',
        agent_type: 'llm',
        name: 'Technical specialist',
        position: { x: 320, y: 240 },
        config: {
          model: 'offline/echo',
          system_prompt: 'You know the product from the inside. Answer the request step by step.',
        },
      },
      {
        agent_id: 'editor',
        agent_type: 'llm',
        name: 'Editor',
        position: { x: 640, y: 120 },
        config: {
          model: 'offline/echo',
          system_prompt: "Make a short and friendly reply out of the specialist's answer.",
        },
      },
    ],
    connections: [
      {
        source_agent_id: 'triage',
        target_agent_id: 'billing',
        connection_type: 'conditional' as const,
        conditions: { expression: IS_BILLING },
        priority: 1,
      },
      {
        source_agent_id: 'triage',
        target_agent_id: 'technical',
        connection_type: 'conditional' as const,
        conditions: { expression: `!(${IS_BILLING})` },
        priority: 2,
      },
      { source_agent_id: 'billing', target_agent_id: 'editor' },
      { source_agent_id: 'technical', target_agent_id: 'editor' },
    ],
  },
};
