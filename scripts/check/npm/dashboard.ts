// The type of a dashboard for Grafana 12, or 13 (tsconfig-13.json): the types of @grafana/schema. Where these allow any object, the types of the panels and of
// Prometheus' queries take its place.
import type { AnnotationQuery } from '@grafana/grafana-foundation-sdk/dashboard';
import type { Dataquery } from '@grafana/grafana-foundation-sdk/prometheus';
import type * as schema from '@grafana/schema';
import type * as bargauge from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as gauge from '@grafana/schema/dist/esm/raw/composable/gauge/panelcfg/x/GaugePanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as timeline from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as text from '@grafana/schema/dist/esm/raw/composable/text/panelcfg/x/TextPanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

type IsAny<T> = 0 extends 1 & T ? true : false;

// JSON has strings and numbers instead of enums, and no functions.
type Json<T> =
  IsAny<T> extends true ? T
  : T extends string ? `${T}`
  : T extends number ? (`${T}` extends `${infer N extends number}` ? N : number)
  : T extends boolean | null | undefined ? T
  : T extends readonly (infer E)[] ? Json<E>[]
  : T extends object ? { [K in keyof T as T[K] extends (...args: never[]) => unknown ? never : K]: Json<T[K]> }
  : T;

type Without<T, K extends PropertyKey> = { [P in keyof T as P extends K ? never : P]: T[P] };

type Query = Json<Dataquery> & { refId: string; datasource: Source };
// A variable, so that the dashboards work beside any Prometheus.
type Source = { type: 'prometheus'; uid: '${datasource}' };

// @grafana/schema types it as any object.
interface DataLink {
  title: string;
  url: string;
  targetBlank?: boolean;
}

interface Organize {
  excludeByName: Record<string, boolean>;
  indexByName: Record<string, number>;
  renameByName: Record<string, string>;
}
interface FilterByValue {
  filters: { fieldName: string; config: { id: 'isNotNull'; options: Record<string, never> } }[];
  match: 'all' | 'any';
  type: 'include' | 'exclude';
}
type Transformation =
  | { id: 'filterByValue'; options: FilterByValue }
  | { id: 'merge'; options: Record<string, never> }
  | { id: 'organize'; options: Organize };

// The name of an override gives the type of its value. `custom.` is the prefix of the panel's options.
type Defaults<Custom> = Without<Json<schema.FieldConfig>, 'custom' | 'links'> & { custom?: Custom; links?: DataLink[] };
type Property<Custom> =
  | { [K in keyof Defaults<Custom> & string]: { id: K; value: NonNullable<Defaults<Custom>[K]> } }[keyof Defaults<Custom> & string]
  | { [K in keyof Custom & string]: { id: `custom.${K}`; value: NonNullable<Custom[K]> } }[keyof Custom & string];

interface PanelOf<Type extends string, Options, Custom> extends Without<schema.Panel, 'type' | 'options' | 'fieldConfig' | 'targets' | 'datasource' | 'transformations'> {
  type: Type;
  title: string;
  description: string;
  gridPos: Json<schema.GridPos>;
  datasource: Source;
  targets: Query[];
  transformations?: Transformation[];
  fieldConfig: {
    defaults: Defaults<Custom>;
    overrides: { matcher: { id: 'byName' | 'byRegexp'; options: string }; properties: Property<Custom>[] }[];
  };
  options: Json<Options>;
}

type Panel =
  | PanelOf<'bargauge', bargauge.Options, Record<string, never>>
  | PanelOf<'gauge', gauge.Options, Record<string, never>>
  | PanelOf<'stat', stat.Options, Record<string, never>>
  | PanelOf<'state-timeline', timeline.Options, Json<timeline.FieldConfig & { spanNulls?: boolean }>>
  | PanelOf<'table', table.Options, Partial<Json<table.FieldConfig>>>
  | PanelOf<'text', text.Options, Record<string, never>>
  | PanelOf<'timeseries', timeseries.Options, Json<timeseries.FieldConfig>>;

interface Row extends Without<Json<schema.RowPanel>, 'panels' | 'type'> {
  type: 'row';
  panels: Panel[];
}

type Annotation = Without<Json<AnnotationQuery>, 'target'> & { target?: Query };

export interface Dashboard
  extends Without<Json<schema.Dashboard>, 'panels' | 'annotations' | 'templating'> {
  uid: string;
  title: string;
  panels: (Panel | Row)[];
  annotations: { list: Annotation[] };
  templating: { list: Json<schema.VariableModel>[] };
}
