// What a dashboard has to be, by Grafana's own types: the compiler finds names, values and kinds that Grafana does not
// know. The tests put each dashboard's JSON behind `const dashboard: Dashboard =`, as a literal, so that nothing more than
// what is declared may be in it.
import type { Dashboard as Whole, DataQuery, Panel, RowPanel } from '@grafana/schema';
import type * as bargauge from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as states from '@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen';
import type * as table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON has the values of enumerations as texts, which TypeScript does not take for their members.
type Plain<T> = 0 extends 1 & T
  ? T
  : T extends string
    ? `${T}`
    : T extends readonly (infer Item)[]
      ? Plain<Item>[]
      : T extends object
        ? { [Key in keyof T]: Plain<T[Key]> }
        : T;

// What the package has no types of: a query of the Prometheus data source, as Grafana's documentation names its parts.
type Query = DataQuery & {
  expr: string;
  legendFormat?: string;
  format?: 'time_series' | 'table' | 'heatmap';
  instant?: boolean;
  range?: boolean;
  exemplar?: boolean;
};

type Some<T> = { [Key in keyof T]?: Some<T[Key]> };

// A panel of one kind, with that kind's options and settings of its fields. What is left out has Grafana's default.
type Kind<Name extends string, Options, Custom = never> = Omit<
  Panel,
  'type' | 'options' | 'fieldConfig' | 'targets'
> & {
  type: Name;
  options?: Some<Options>;
  fieldConfig: Omit<NonNullable<Panel['fieldConfig']>, 'defaults'> & {
    defaults: Omit<NonNullable<Panel['fieldConfig']>['defaults'], 'custom'> & { custom?: Some<Custom> };
  };
  targets: Query[];
};

type Kinds =
  | Kind<'timeseries', timeseries.Options, timeseries.FieldConfig>
  | Kind<'stat', stat.Options>
  | Kind<'bargauge', bargauge.Options>
  | Kind<'heatmap', heatmap.Options, heatmap.FieldConfig>
  | Kind<'state-timeline', states.Options, states.FieldConfig>
  | Kind<'table', table.Options, table.FieldConfig>
  | RowPanel;

export type Dashboard = Plain<Omit<Whole, 'panels'> & { panels: Kinds[] }>;
