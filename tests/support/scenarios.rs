//! Scenarios for the alerts: a fleet over hours or days in a few lines of YAML, and what fires when. They become files for
//! `promtool test rules`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{iter, thread};

use serde::Deserialize;
use serde_json::{Value, json};

use super::alerts::{Rule, rules};
use super::tools;

/// `promtool test rules` of this major version succeeds with each of these files, which have names for its messages.
pub fn test_rules(major: u8, files: &[(String, PathBuf)]) {
    let promtool = tools::prometheus(major).promtool;
    let run = |(name, file): &(String, PathBuf)| {
        let mut test = Command::new(&promtool);
        // With the default, a third of the time is the collection of garbage: here below 600 MB there is none.
        test.env("GOGC", "off").env("GOMEMLIMIT", "600MiB").env("GOMAXPROCS", "1").args(["test", "rules"]).arg(file);
        let output = test.output().expect("promtool runs");
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        (!output.status.success()).then(|| format!("{name}:\n{text}"))
    };
    // Some take a hundred times as long as others: each processor takes the next one.
    let next = AtomicUsize::new(0);
    let worker =
        || iter::from_fn(|| files.get(next.fetch_add(1, Ordering::Relaxed))).filter_map(run).collect::<String>();
    let failed = thread::scope(|scope| {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join().expect("no panic")).collect::<String>()
    });
    assert!(failed.is_empty(), "promtool {major}: {failed}");
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub name: String,
    /// How long it lasts.
    minutes: u64,
    /// Minutes between two samples.
    #[serde(default = "one")]
    step: u64,
    #[serde(default = "one_sidecar")]
    sidecars: Vec<Sidecar>,
    /// When the tunnel does not answer, and so no device.
    #[serde(default)]
    tunnel_off: Ranges,
    #[serde(default)]
    devices: Vec<Devices>,
    /// Further series, with values as promtool has them.
    #[serde(default)]
    series: BTreeMap<String, String>,
    /// Minute and number of firing alerts by name, which may have matchers: `DiskFull{uuid="gap"}`. A key with a bracket is a query.
    expect: Vec<(u64, BTreeMap<String, f64>)>,
    /// Alerts with all of their text.
    #[serde(default)]
    texts: Vec<Text>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sidecar {
    #[serde(default = "baletheus")]
    name: String,
    #[serde(default)]
    dead: Ranges,
    /// When the API does not answer it: what it exports of the devices stays as it is.
    #[serde(default)]
    api_off: Ranges,
    /// The only fleet that it knows.
    fleet: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Devices {
    /// The uuid and the name; with a count, its beginning.
    uuid: String,
    count: Option<u64>,
    #[serde(default = "gateways")]
    fleet: String,
    /// When it is not connected to balenaCloud.
    #[serde(default)]
    offline: Ranges,
    /// When its exporters do not answer; as long as it is offline, if not given.
    failing: Option<Ranges>,
    /// When the API does not list it.
    #[serde(default)]
    absent: Ranges,
    #[serde(default = "node")]
    exporters: Vec<String>,
    /// Labels of `balena_device_info` at some time, beside uuid, name and fleet.
    #[serde(default)]
    labels: Vec<(Ranges, BTreeMap<String, String>)>,
    /// Series of its first exporter, or of the sidecar for `balena_…`, with values as promtool has them.
    #[serde(default)]
    metrics: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    at: u64,
    alert: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    summary: String,
    description: String,
}

/// Spans of minutes, such as `30-100 140-`; the second minute is not in it.
#[derive(Clone, Default, Deserialize)]
#[serde(from = "String")]
struct Ranges(Vec<(u64, u64)>);

impl From<String> for Ranges {
    fn from(text: String) -> Ranges {
        let minute = |text: &str, default| if text.is_empty() { default } else { text.parse().expect("minutes") };
        let range = |range: &str| {
            let (from, to) = range.split_once('-').unwrap_or_else(|| panic!("{range} is no range"));
            (minute(from, 0), minute(to, u64::MAX))
        };
        Ranges(text.split_whitespace().map(range).collect())
    }
}

impl Ranges {
    fn has(&self, minute: u64) -> bool {
        self.0.iter().any(|(from, to)| (*from..*to).contains(&minute))
    }

    /// The last minute up to this one that is outside.
    fn before(&self, minute: u64) -> u64 {
        (0..=minute).rev().find(|minute| !self.has(*minute)).unwrap_or(0)
    }

    /// Seconds since the epoch when the last range began or ended; three days before it if none has.
    fn last_change(&self, minute: u64) -> f64 {
        let change = (1..=minute).rev().find(|at| self.has(*at) != self.has(at - 1));
        change.map_or(-259_200.0, |minute| minute as f64 * 60.0)
    }
}

fn one() -> u64 {
    1
}
fn baletheus() -> String {
    "baletheus:9797".into()
}
fn gateways() -> String {
    "org/gw".into()
}
fn node() -> Vec<String> {
    vec!["node".into()]
}
fn one_sidecar() -> Vec<Sidecar> {
    vec![Sidecar { name: baletheus(), dead: Ranges::default(), api_off: Ranges::default(), fleet: None }]
}

/// Values in promtool's notation: runs are one item, and a series that stops becomes stale.
fn notation(values: impl Iterator<Item = Option<f64>>) -> String {
    let mut items: Vec<(String, u64)> = Vec::new();
    let mut known = false;
    for value in values {
        let text = match value {
            Some(value) => value.to_string(),
            None if known => "stale".into(),
            None => "_".into(),
        };
        known = value.is_some();
        match items.last_mut() {
            Some((last, count)) if *last == text && text != "stale" => *count += 1,
            _ => items.push((text, 1)),
        }
    }
    let item = |(text, count): (String, u64)| match (&*text, count) {
        (_, 1) => text,
        ("_", count) => format!("_x{count}"),
        (_, count) => format!("{text}x{}", count - 1),
    };
    items.into_iter().map(item).collect::<Vec<_>>().join(" ")
}

impl Scenario {
    /// How often promtool evaluates all rules: nearly all of its work.
    pub fn evaluations(&self) -> u64 {
        let last = self.expect.iter().map(|(at, _)| *at).max();
        last.max(self.last_text()).unwrap_or(0) / self.interval()
    }

    fn last_text(&self) -> Option<u64> {
        self.texts.iter().map(|text| text.at).max()
    }

    /// Leaves out what is expected after the last text.
    pub fn end_with_texts(&mut self) {
        let last = self.last_text().unwrap_or(0);
        self.expect.retain(|(at, _)| *at <= last);
    }

    /// The minutes between two evaluations.
    fn interval(&self) -> u64 {
        if self.step == 1 { 1 } else { 3 }
    }

    /// What it says of alerts: that one fires, that one does not, and its text.
    pub fn claims(&self) -> impl Iterator<Item = (String, &'static str)> {
        let counts = self.expect.iter().flat_map(|(_, firing)| firing);
        let counts = counts.filter_map(|(name, count)| {
            let name = name.split('{').next()?.to_owned();
            Some((name, if *count > 0.0 { "fires" } else { "does not fire" }))
        });
        counts.chain(self.texts.iter().map(|text| (text.alert.clone(), "has a text")))
    }

    /// A file for `promtool test rules`, in JSON.
    pub fn test(&self, rule_files: &[String]) -> Value {
        let mut series = self.stack();
        for devices in &self.devices {
            let uuids = match devices.count {
                None => vec![devices.uuid.clone()],
                Some(count) => (0..count).map(|number| format!("{}{number:03}", devices.uuid)).collect(),
            };
            uuids.iter().for_each(|uuid| series.extend(self.device(devices, uuid)));
        }
        series.extend(self.series.clone());
        let query = |name: &str| match name.split_once('{') {
            _ if name.contains('(') => name.to_owned(),
            Some(("", matchers)) => {
                format!("count(ALERTS{{alertstate=\"firing\",alertname!=\"Watchdog\",{matchers}) or vector(0)")
            }
            Some((name, matchers)) => {
                format!("count(ALERTS{{alertstate=\"firing\",alertname=\"{name}\",{matchers}) or vector(0)")
            }
            None => format!("count(ALERTS{{alertstate=\"firing\",alertname=\"{name}\"}}) or vector(0)"),
        };
        let expected =
            self.expect.iter().flat_map(|(at, firing)| firing.iter().map(move |(name, count)| (at, name, count)));
        let queries = expected.map(|(at, name, count)| {
            json!({"expr": query(name), "eval_time": format!("{at}m"), "exp_samples": [{"labels": "{}", "value": count}]})
        });
        json!({
            "rule_files": rule_files,
            "evaluation_interval": format!("{}m", self.interval()),
            "group_eval_order": ["inventory", "fleets", "devices", "versions", "services", "reach", "health", "fleet", "discovery", "tunnel", "monitoring"],
            "tests": [{
                "name": self.name,
                "interval": format!("{}m", self.step),
                "input_series": series.iter().map(|(series, values)| json!({"series": series, "values": values})).collect::<Vec<_>>(),
                "promql_expr_test": queries.collect::<Vec<_>>(),
                "alert_rule_test": self.texts.iter().map(Text::test).collect::<Vec<_>>(),
            }],
        })
    }

    fn values(&self, value: impl Fn(u64) -> Option<f64>) -> String {
        notation((0..=self.minutes / self.step).map(|sample| value(sample * self.step)))
    }

    /// The stack's own series.
    fn stack(&self) -> Vec<(String, String)> {
        let (mut series, always) = (Vec::new(), self.values(|_| Some(1.0)));
        let up = |off: &Ranges| self.values(|minute| Some(f64::from(!off.has(minute))));
        for Sidecar { name, dead, api_off, .. } in &self.sidecars {
            let labels = format!("{{job=\"baletheus\",instance=\"{name}\"}}");
            let alive = |value: &dyn Fn(u64) -> f64| self.values(|minute| (!dead.has(minute)).then(|| value(minute)));
            series.push((format!("up{labels}"), up(dead)));
            for what in ["", "device_"] {
                let renewed = alive(&|minute| api_off.before(minute) as f64 * 60.0 + 1.0);
                series.push((format!("baletheus_last_{what}refresh_timestamp_seconds{labels}"), renewed));
            }
            series.push((format!("process_start_time_seconds{labels}"), alive(&|_| -100_000.0)));
            series.push((format!("baletheus_list_held_back{labels}"), alive(&|_| 0.0)));
        }
        series.push(("up{job=\"baletheus-tunnel\",instance=\"tunnel:9798\"}".into(), up(&self.tunnel_off)));
        for job in ["prometheus", "alertmanager", "grafana"] {
            series.push((format!("up{{job=\"{job}\",instance=\"{job}\"}}"), always.clone()));
        }
        series.retain(|(name, _)| !self.series.contains_key(name));
        series
    }

    fn device(&self, device: &Devices, uuid: &str) -> Vec<(String, String)> {
        let mut series = Vec::new();
        let failing = device.failing.as_ref().unwrap_or(&device.offline);
        for job in &device.exporters {
            let up = self.values(|minute| {
                (!device.absent.has(minute)).then(|| f64::from(!failing.has(minute) && !self.tunnel_off.has(minute)))
            });
            series.push((format!("up{{uuid=\"{uuid}\",job=\"{job}\",instance=\"{uuid}:{job}\"}}"), up));
        }
        for Sidecar { name, dead, api_off, fleet } in &self.sidecars {
            if fleet.as_ref().is_some_and(|fleet| *fleet != device.fleet) {
                continue;
            }
            let of = format!("job=\"baletheus\",instance=\"{name}\",uuid=\"{uuid}\"");
            // What the API said last.
            let told = |value: &dyn Fn(u64) -> f64| {
                self.values(|minute| {
                    let known = api_off.before(minute);
                    (!dead.has(minute) && !device.absent.has(known)).then(|| value(known))
                })
            };
            series.push((
                format!("balena_device_online{{{of}}}"),
                told(&|minute| f64::from(!device.offline.has(minute))),
            ));
            let event = told(&|minute| device.offline.last_change(minute));
            series.push((format!("balena_device_last_connectivity_event_timestamp_seconds{{{of}}}"), event));
            let always = vec![(Ranges::from("0-".to_owned()), BTreeMap::new())];
            for (during, labels) in if device.labels.is_empty() { &always } else { &device.labels } {
                let mut all = BTreeMap::from([
                    ("device_name".to_owned(), uuid.to_owned()),
                    ("fleet".to_owned(), device.fleet.clone()),
                ]);
                all.extend(labels.clone());
                let all: String = all.iter().map(|(name, value)| format!(",{name}=\"{value}\"")).collect();
                let info = self.values(|minute| {
                    let known = api_off.before(minute);
                    (!dead.has(minute) && !device.absent.has(known) && during.has(known)).then_some(1.0)
                });
                series.push((format!("balena_device_info{{{of}{all}}}"), info));
            }
        }
        for (metric, values) in &device.metrics {
            let (name, labels) = metric.trim_end_matches('}').split_once('{').unwrap_or((metric, ""));
            let (job, instance) = match metric.starts_with("balena_") {
                true => ("baletheus".to_owned(), self.sidecars[0].name.clone()),
                false => (device.exporters[0].clone(), format!("{uuid}:{}", device.exporters[0])),
            };
            let comma = if labels.is_empty() { "" } else { "," };
            let series_name = format!("{name}{{uuid=\"{uuid}\",job=\"{job}\",instance=\"{instance}\"{comma}{labels}}}");
            series.push((series_name, values.clone()));
        }
        series
    }
}

impl Text {
    fn test(&self) -> Value {
        let rule: Rule =
            rules().into_iter().find(|rule| rule.alert.as_ref() == Some(&self.alert)).expect("an alert of this name");
        let mut labels = rule.labels;
        labels.extend(self.labels.clone());
        json!({
            "alertname": self.alert,
            "eval_time": format!("{}m", self.at),
            "exp_alerts": [{
                "exp_labels": labels,
                "exp_annotations": {
                    "summary": self.summary, "description": self.description, "runbook_url": rule.annotations["runbook_url"],
                },
            }],
        })
    }
}
