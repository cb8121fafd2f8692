import request from 'supertest';

/** What tests read of a deployment. */
export interface Deployment {
  deployment_id: string;
  deployment_name: string;
  environment: string;
  workflow_id: string;
  revision_id: string;
  status: string;
  deployed_at: string;
  stopped_at?: string;
}

/** One `template` agent. */
export const saying = (template: string) => ({
  agents: [{ agent_id: 'a', agent_type: 'template', config: { template } }],
});

/** The routes of deployments on a running server; `supertest` requests, so that a status can be expected of them. */
export class DeploymentRoutes {
  private names = 0;

  constructor(private readonly url: string) {}

  readonly uniqueName = () => `deployment-${++this.names}`;

  /** Answers with the new workflow's id. */
  async createWorkflow(fields: object = {}): Promise<string> {
    const body = { name: 'greeter', configuration: saying('hello'), ...fields };
    const response = await request(this.url).post('/api/workflows').send(body).expect(201);
    return (response.body as { workflow_id: string }).workflow_id;
  }

  deploy(workflowId: string, body: object) {
    return request(this.url).post(`/api/workflows/${workflowId}/deploy`).send(body);
  }

  /** A new workflow deployed under a new name, unless `fields` says otherwise. */
  async deployed(fields: { deployment_name?: string; environment?: string } = {}): Promise<Deployment> {
    const body = { deployment_name: this.uniqueName(), ...fields };
    const response = await this.deploy(await this.createWorkflow(), body).expect(201);
    return response.body as Deployment;
  }

  stop(name: string, query: object = {}) {
    return request(this.url).post(`/api/workflows/deployments/${name}/stop`).query(query);
  }

  remove(name: string, query: object = {}) {
    return request(this.url).delete(`/api/workflows/deployments/${name}`).query(query);
  }

  get(name: string, query: object = {}) {
    return request(this.url).get(`/api/deployments/${name}`).query(query);
  }
}
