// What must not pass: each line behind a comment is an error, or the comment is one.
import type { Dashboard } from './dashboard.js';

type Panel = Dashboard['panels'][number];
const source = { type: 'prometheus', uid: '${datasource}' } as const;
const frame = { title: '', description: '', gridPos: { h: 1, w: 1, x: 0, y: 0 }, datasource: source } as const;
const table = { frameIndex: 0, showHeader: true } as const;

export const panels: Panel[] = [
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: { unit: 's' }, overrides: [] }, options: table },
  // @ts-expect-error an option that the panel does not have
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: {}, overrides: [] }, options: { ...table, showHead: true } },
  // @ts-expect-error an option of another type
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: {}, overrides: [] }, options: { frameIndex: '0', showHeader: true } },
  // @ts-expect-error a word that is not among those of the option
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: {}, overrides: [] }, options: { ...table, cellHeight: 'tiny' } },
  // @ts-expect-error a field that has another type
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: { unit: 1 }, overrides: [] }, options: table },
  // @ts-expect-error a field that no panel has
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: { units: 's' }, overrides: [] }, options: table },
  // @ts-expect-error what is another panel's own
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: { custom: { fillOpacity: 1 } }, overrides: [] }, options: table },
  // @ts-expect-error a panel that there is none of
  { ...frame, type: 'graph', targets: [], fieldConfig: { defaults: {}, overrides: [] }, options: {} },
  // @ts-expect-error a query without an expression
  { ...frame, type: 'table', targets: [{ refId: 'A', datasource: source }], fieldConfig: { defaults: {}, overrides: [] }, options: table },
  // @ts-expect-error a data source that only one Grafana has
  { ...frame, datasource: { type: 'prometheus', uid: 'prometheus' }, type: 'table', targets: [], fieldConfig: { defaults: {}, overrides: [] }, options: table },
  // @ts-expect-error a format that there is none of
  { ...frame, type: 'table', targets: [{ refId: 'A', datasource: source, expr: 'up', format: 'csv' }], fieldConfig: { defaults: {}, overrides: [] }, options: table },
  // @ts-expect-error an override of a field that the panel does not have
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: {}, overrides: [{ matcher: { id: 'byName', options: 'x' }, properties: [{ id: 'custom.widht', value: 1 }] }] }, options: table },
  // @ts-expect-error an override with another type
  { ...frame, type: 'table', targets: [], fieldConfig: { defaults: {}, overrides: [{ matcher: { id: 'byName', options: 'x' }, properties: [{ id: 'decimals', value: '1' }] }] }, options: table },
];

const dashboard = { uid: 'x', title: 'x', schemaVersion: 42, panels, annotations: { list: [] }, templating: { list: [] } };
export const dashboards: Dashboard[] = [
  dashboard,
  // @ts-expect-error a number where there is a text
  { ...dashboard, refresh: 60 },
  // @ts-expect-error what an export for sharing has
  { ...dashboard, __inputs: [] },
  // @ts-expect-error a kind of variable that there is none of
  { ...dashboard, templating: { list: [{ name: 'x', type: 'queries' }] } },
];
