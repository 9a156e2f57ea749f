//! Each way to run the rules that the documents and examples show, as it stands: promtool evaluates the rules that it loads on the series
//! that its jobs scrape. While all is well nothing fires, and each fault raises an alert.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use serde_json::Value;

use crate::support::alerts::rule_files;
use crate::support::grafana::{list, text};
use crate::support::scenarios::test_rules;

/// Enough for the alerts about fleets on each of two shards.
const DEVICES: usize = 12;

/// One Prometheus server: its jobs in the form of a scrape configuration, the rules that it loads, and which share it has.
struct Server {
    name: String,
    jobs: Vec<Value>,
    rules: BTreeMap<String, String>,
    alertmanager: bool,
    /// Which of two shards, if the devices are shared.
    shard: Option<usize>,
}

fn read(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The first example of a configuration in a document.
fn example(document: &str) -> String {
    let text = read(document);
    let (_, rest) = text.split_once("\n```yaml\nglobal:").unwrap_or_else(|| panic!("{document}: no configuration"));
    format!("global:{}", rest.split("\n```").next().unwrap())
}

fn rules_of(files: impl IntoIterator<Item = PathBuf>) -> BTreeMap<String, String> {
    let name = |file: &PathBuf| file.file_name().unwrap().to_string_lossy().into_owned();
    files.into_iter().map(|file| (name(&file), fs::read_to_string(&file).unwrap())).collect()
}

/// A server that is configured by a file. `rule_files` names all rules, in a folder of its own.
fn by_file(name: &str, config: &str, rules: BTreeMap<String, String>, shard: Option<usize>) -> Server {
    let config: Value = yaml_serde::from_str(config).unwrap_or_else(|error| panic!("{name}: {error}"));
    let globs = list(&config, "/rule_files");
    assert!(globs.len() == 1 && globs[0].as_str().unwrap().ends_with("alerts/*.yml"), "{name}: {globs:?}");
    let alertmanager = !list(&config, "/alerting/alertmanagers").is_empty();
    Server { name: name.to_owned(), jobs: list(&config, "/scrape_configs").to_vec(), rules, alertmanager, shard }
}

/// A server of Prometheus Operator, with the rules that the command of docs/kubernetes-debian.md makes resources of.
fn by_operator(folder: &str, shard: Option<usize>) -> Server {
    let command = kubernetes("examples/kubernetes/rules ");
    let (command, _) = command.split_once('|').expect("a pipe to kubectl");
    let output = Command::new("sh").args(["-c", command]).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let resources = documents(&String::from_utf8(output.stdout).unwrap());
    let rules = resources.iter().map(|rule| {
        let groups = yaml_serde::to_string(&rule["spec"]).unwrap();
        (format!("{}.yml", rule["metadata"]["name"].as_str().unwrap()), groups)
    });
    let jobs = documents(&read(&format!("examples/kubernetes/{folder}/scrapeconfigs.yaml")));
    let prometheus = documents(&read(&format!("examples/kubernetes/{folder}/prometheus.yaml")));
    assert_eq!(prometheus[0]["spec"]["shards"].as_u64(), shard.map(|_| 2));
    Server {
        name: folder.to_owned(),
        rules: rules.collect(),
        jobs: jobs.iter().map(|job| job["spec"].clone()).collect(),
        alertmanager: prometheus[0]["spec"].get("alerting").is_some(),
        shard,
    }
}

fn documents(text: &str) -> Vec<Value> {
    yaml_serde::Deserializer::from_str(text).map(|document| Value::deserialize(document).unwrap()).collect()
}

/// The command of docs/kubernetes-debian.md that begins so, on one line.
fn kubernetes(start: &str) -> String {
    let page = read("docs/kubernetes-debian.md");
    let at =
        page.find(&format!("   {start}")).unwrap_or_else(|| panic!("docs/kubernetes-debian.md: no command {start}"));
    page[at..].split("```").next().unwrap().replace("\\\n", " ").replace('\n', " ")
}

fn servers() -> Vec<Server> {
    let plain = kubernetes("kubectl create configmap baletheus-alerts");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let plain =
        plain.split_whitespace().filter_map(|word| word.strip_prefix("--from-file=")).map(|file| root.join(file));
    let plain = rules_of(plain);
    let mut servers = vec![
        by_file("prometheus.yml", &read("prometheus.yml"), rules_of(rule_files()), None),
        by_file("docs/dashboards.md", &example("docs/dashboards.md"), rules_of(rule_files()), None),
        by_file("plain", &read("examples/kubernetes/plain/prometheus.yml"), plain, None),
        by_operator("operator", None),
    ];
    for shard in [0, 1] {
        servers.push(by_operator("operator-sharded", Some(shard)));
    }
    servers
}

impl Server {
    /// The job with this name, if this server scrapes it.
    fn scrapes(&self, job: &str) -> Option<&Value> {
        let found = self.jobs.iter().find(|found| [text(found, "job_name"), text(found, "jobName")].contains(&job))?;
        let sets = |label: &str| list(found, "/relabelings").iter().any(|rule| text(rule, "targetLabel") == label);
        // Prometheus Operator gives a target to one shard only, unless it has this label.
        let on_this_shard = found.get("jobName").is_none() || sets("__tmp_disable_sharding");
        (self.shard.is_none_or(|shard| shard == 0) || on_this_shard).then_some(found)
    }

    /// Of the sidecar's series, whether this server keeps those of a device.
    fn keeps(&self, device: usize) -> bool {
        let Some(job) = self.scrapes("baletheus") else { return false };
        let shares = job.to_string().contains("\"hashmod\"");
        !shares || self.is_own(device)
    }

    fn is_own(&self, device: usize) -> bool {
        self.shard.is_none_or(|shard| device % 2 == shard)
    }

    /// The series of this server for three hours. After an hour, a value of `fault` takes the place of the usual one.
    fn series(&self, fault: &BTreeMap<String, &str>) -> String {
        let mut series = BTreeMap::new();
        let mut add = |name: &str, usual: &str| series.insert(name.to_owned(), usual.to_owned());
        for job in ["baletheus", "baletheus-tunnel", "prometheus", "alertmanager"] {
            if self.scrapes(job).is_some() {
                add(&format!("up{{job=\"{job}\",instance=\"{job}\"}}"), "1+0x");
            }
        }
        if self.scrapes("baletheus").is_some() {
            add(r#"baletheus_targets{job="baletheus",instance="baletheus"}"#, &format!("{DEVICES}+0x"));
            for what in ["refresh", "device_refresh"] {
                let name =
                    format!(r#"baletheus_last_{what}_timestamp_seconds{{job="baletheus",instance="baletheus"}}"#);
                add(&name, "1+60x");
            }
        }
        if self.scrapes("prometheus").is_some() {
            let ours = r#"job="prometheus",instance="prometheus""#;
            add(&format!(r#"prometheus_sd_discovered_targets{{{ours},config="balena"}}"#), &format!("{DEVICES}+0x"));
            let known = if self.alertmanager { "1+0x" } else { "0+0x" };
            add(&format!("prometheus_notifications_alertmanagers_discovered{{{ours}}}"), known);
        }
        for device in 0..DEVICES {
            let labels = format!(r#"job="baletheus",instance="baletheus",uuid="d{device}""#);
            if self.keeps(device) {
                let of_fleet = format!(r#"{labels},device_name="lamp-{device}",fleet="org/lamps""#);
                add(&format!("balena_device_info{{{of_fleet}}}"), "1+0x");
                add(&format!("balena_device_online{{{labels}}}"), "1+0x");
                add(&format!("balena_device_last_connectivity_event_timestamp_seconds{{{labels}}}"), "1+0x");
            }
            if self.is_own(device) {
                add(&format!(r#"up{{job="node",instance="d{device}",uuid="d{device}"}}"#), "1+0x");
            }
        }
        let mut text = String::new();
        for (name, usual) in series {
            let value = fault.iter().find(|(start, _)| name.starts_with(&***start)).map_or(&*usual, |(_, value)| value);
            let values = if value == usual { format!("{usual}180") } else { format!("{usual}60 {value}120") };
            writeln!(text, "      - series: '{name}'\n        values: '{values}'").unwrap();
        }
        text
    }

    /// Whether this server loads alerts about the stack itself.
    fn watches_itself(&self) -> bool {
        self.rules.values().any(|rules| rules.contains("alert: Watchdog"))
    }
}

/// After an hour of a fault, alerts with such labels fire: on each server, or on that of the device.
struct Fault {
    name: &'static str,
    series: Vec<(String, &'static str)>,
    alerts: &'static [&'static str],
}

fn faults() -> [Fault; 4] {
    let up = |job: &str| (format!("up{{job=\"{job}\""), "0+0x");
    let gone = ["baletheus_", "balena_device_"].map(|start| (start.to_owned(), "_x"));
    [
        Fault {
            name: "a device is offline",
            series: vec![
                (r#"up{job="node",instance="d1","#.into(), "0+0x"),
                (r#"balena_device_online{job="baletheus",instance="baletheus",uuid="d1"}"#.into(), "0+0x"),
            ],
            alerts: &[r#"scope="device", uuid="d1""#],
        },
        Fault { name: "no device answers", series: vec![up("node")], alerts: &[r#"scope=~"discovery|tunnel|fleet""#] },
        Fault {
            name: "sidecar and tunnel are dead",
            series: gone.into_iter().chain([up("baletheus"), up("baletheus-tunnel")]).collect(),
            alerts: &[r#"scope="discovery""#, r#"scope="tunnel""#],
        },
        Fault {
            name: "Prometheus stores nothing of itself",
            series: vec![("up{job=\"prometheus\"".into(), "_x")],
            alerts: &[r#"scope="monitoring""#],
        },
    ]
}

#[test]
fn each_recipe_is_quiet_while_all_is_well_and_tells_each_fault() {
    let (mut files, folder) = (Vec::new(), tempfile::tempdir().unwrap());
    for server in servers() {
        let place = folder.path().join(format!("{}-{:?}", server.name.replace('/', "-"), server.shard));
        fs::create_dir(&place).unwrap();
        for (name, rules) in &server.rules {
            fs::write(place.join(name), rules).unwrap();
        }
        let names: Vec<_> = server.rules.keys().collect();
        let mut tests =
            format!("rule_files: {}\nevaluation_interval: 2m\ntests:\n", serde_json::to_string(&names).unwrap());
        let firing = |labels: &str| format!(r#"count(ALERTS{{alertstate="firing", {labels}}}) > bool 0 or vector(0)"#);
        let mut add = |name: &str, series: &str, queries: &[(String, bool)]| {
            let what = format!("{}, shard {:?}: {name}", server.name, server.shard);
            write!(tests, "  - name: '{what}'\n    interval: 1m\n    input_series:\n{series}    promql_expr_test:\n")
                .unwrap();
            for (query, holds) in queries {
                let (query, value) = (serde_json::to_string(query).unwrap(), u8::from(*holds));
                writeln!(
                    tests,
                    "      - {{expr: {query}, eval_time: 2h, exp_samples: [{{labels: '{{}}', value: {value}}}]}}"
                )
                .unwrap();
            }
        };
        add("all is well", &server.series(&BTreeMap::new()), &[(firing(r#"alertname!="Watchdog""#), false)]);
        for fault in faults() {
            let fires = fault.name != "a device is offline" || server.is_own(1);
            let queries: Vec<_> = fault.alerts.iter().map(|labels| (firing(labels), fires)).collect();
            if server.watches_itself() || fault.name != "Prometheus stores nothing of itself" {
                add(fault.name, &server.series(&fault.series.into_iter().collect()), &queries);
            }
        }
        let file = place.join("tests");
        fs::write(&file, tests).unwrap();
        files.push((format!("{}, shard {:?}", server.name, server.shard), file));
    }
    // The unit tests of the rules run with Prometheus 2 as well.
    test_rules(3, &files);
}
