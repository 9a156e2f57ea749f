//! Hostile names against every output. `tests/hostile-names.jsonl` has one string of JSON a line, as the API would send it: HTML, URLs,
//! escapes of terminals, characters that change the direction of writing, line breaks, quotes, templates, YAML, and text that is no
//! Unicode. A device has each of them as its name, its versions, its address, and as keys and values of its tags.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::binary;
use crate::support::cloud::{Cloud, Reply};
use crate::support::prometheus::promtool_check_config;
use crate::support::sidecar::{PATIENCE, Sidecar, finish};
use crate::support::status::Status;
use crate::support::tools;
use regex::Regex;
use serde_json::{Value, json};

const CORPUS: &str = include_str!("../hostile-names.jsonl");
/// A label value that is longer is left out.
const MAX_VALUE_SIZE: usize = 512;

/// Each as the API sends it, and as it is read; none if it is no Unicode, which is read as nothing.
fn corpus() -> Vec<(&'static str, Option<String>)> {
    CORPUS.lines().map(|raw| (raw, serde_json::from_str(raw).ok())).collect()
}

fn uuid(id: usize) -> String {
    format!("{id:032x}")
}

/// The release of these devices is on no list, so nothing can be said of its labels.
fn sidecar(cloud: &Cloud) -> Sidecar {
    binary::sidecar(cloud).env("SERVICE_LABELS", "false")
}

/// A cloud with a device for each of them.
fn cloud() -> Cloud {
    let device = |(id, (raw, _)): (usize, (&str, _))| {
        format!(
            r#"{{"id":{id},"uuid":"{}","device_name":{raw},"os_version":{raw},"os_variant":{raw},"supervisor_version":{raw},
            "ip_address":{raw},"api_heartbeat_state":{raw},"is_connected_to_vpn":true,"is_of__device_type":[{{"slug":"raspberrypi3"}}],
            "belongs_to__application":[{{"id":1,"app_name":"gateways","slug":"acme/gateways"}}],
            "is_running__release":[{{"id":1,"commit":{raw},"raw_version":{raw}}}],
            "device_tag":[{{"tag_key":{raw},"value":{raw}}},{{"tag_key":"site","value":{raw}}},
            {{"tag_key":"prometheus.io/exporters","value":{raw}}},{{"tag_key":"prometheus.io/interval","value":{raw}}},
            {{"tag_key":"prometheus.io/alert","value":{raw}}},{{"tag_key":"prometheus.io/scheme","value":{raw}}}]}}"#,
            uuid(id)
        )
    };
    let devices: Vec<_> = (1..).zip(corpus()).map(device).collect();
    let body = format!("{{\"d\":[{}]}}", devices.join(","));
    let cloud = Cloud::start(Vec::new());
    cloud.intercept(move |seen, _| {
        let is_page = seen.target.starts_with("/v7/device?");
        is_page.then(|| Reply::status(200, &[("Content-Type", "application/json")], body.as_bytes()))
    });
    cloud
}

/// Characters that move the cursor of a terminal, change the direction of writing, or cannot be seen.
fn is_harmful(c: char) -> bool {
    static HARMFUL: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]").unwrap());
    HARMFUL.is_match(c.encode_utf8(&mut [0; 4]))
}

#[track_caller]
fn expect_harmless(text: &str) {
    for line in text.split('\n') {
        assert!(!line.contains(is_harmful), "{line:?}");
    }
}

#[test]
fn it_has_all_kinds() {
    let corpus = corpus();
    assert!(corpus.len() >= 90, "{}", corpus.len());
    let has = |text: &str| corpus.iter().any(|(_, read)| read.as_deref().is_some_and(|read| read.contains(text)));
    for text in ["<script", "javascript:", "\u{1b}", "\u{9b}", "\u{202e}", "\n", "\"", "{{", "\0", "!!python", "](http"]
    {
        assert!(has(text), "{text:?}");
    }
    assert!(corpus.iter().filter(|(_, read)| read.is_none()).count() >= 3);
}

#[test]
fn the_log_has_one_harmless_line_for_each_record() {
    let cloud = cloud();
    let own = Regex::new(r"^\d{4}-\d\d-\d\dT[\d:.]+Z (ERROR|WARN |INFO |DEBUG) ").unwrap();
    for format in ["text", "json"] {
        let log = sidecar(&cloud).env("LOG_LEVEL", "debug").env("LOG_FORMAT", format).oneshot();
        expect_harmless(&log);
        assert!(log.lines().count() > 200, "{log}");
        for line in log.lines() {
            let is_own = match format {
                "text" => own.is_match(line) && !line.starts_with("1999"),
                _ => serde_json::from_str::<Value>(line).is_ok_and(|record| {
                    record["target"].as_str() == Some("baletheus")
                        || record["target"].as_str().is_some_and(|target| target.starts_with("baletheus::"))
                }),
            };
            assert!(is_own, "{line}");
            assert!(line.len() < 3000, "{line}");
        }
    }
}

#[test]
fn check_has_one_harmless_row_for_each_target() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud).env("TUNNEL_URL", "http://127.0.0.1:9");
    let report = |args: &[&str]| {
        let mut command = sidecar.command();
        command.arg("check").args(args);
        let output = finish(command);
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("UTF-8"))
    };
    let count = corpus().len();
    for text in report(&[]) {
        expect_harmless(&text);
    }
    assert!(!report(&[])[0].contains("fridge-77  "), "a name makes columns");
    // a head, the rows, an empty line and the sums
    assert_eq!(report(&[])[0].lines().count(), 1 + count + 2);
    let [json, _] = report(&["--json"]);
    expect_harmless(&json);
    let rows: Vec<Value> = serde_json::from_str(&json).expect("JSON");
    assert_eq!(rows.len(), count);
    for (row, (_, read)) in rows.iter().zip(corpus()) {
        let name = read.filter(|name| !name.trim().is_empty()).map(|name| name.chars().take(255).collect::<String>());
        // a device without a name is shown by its uuid
        let uuid = row["uuid"].as_str().expect("a uuid");
        let shown = name.map_or(uuid.to_owned(), |name| format!("{name} ({})", &uuid[..7]));
        assert_eq!(row["device"], shown, "it is the same name in JSON");
    }
}

#[test]
fn the_target_file_has_each_as_a_value_and_nothing_more() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud);
    sidecar.oneshot();
    let groups: Vec<Value> = serde_json::from_str(&sidecar.list()).expect("JSON");
    assert_eq!(groups.len(), corpus().len());
    let name = Regex::new("^[a-zA-Z_][a-zA-Z0-9_]*$").unwrap();
    for (group, (id, (_, read))) in groups.iter().zip((1..).zip(corpus())) {
        let text = read.unwrap_or_default();
        assert_eq!(group["targets"], json!([format!("{}.balena:80", uuid(id))]), "{text:?}");
        let labels = group["labels"].as_object().expect("labels");
        assert!(
            labels.keys().all(|label| name.is_match(label) && !["__address__", "alert", "job"].contains(&&**label))
        );
        let expected = Some(Value::from(text.as_str())).filter(|_| text.len() <= MAX_VALUE_SIZE);
        let plain = expected.as_ref().filter(|_| !text.is_empty());
        for label in ["device_name", "os_version", "commit"] {
            assert_eq!(labels.get(label), plain, "{label} of {text:?}");
        }
        assert_eq!(labels.get("__meta_balena_tag_site"), expected.as_ref(), "{text:?}");
    }
    let config = sidecar.path("prometheus.yml");
    fs::write(&config, "scrape_configs: [{ job_name: balena, file_sd_configs: [{ files: [balena.json] }] }]\n")
        .unwrap();
    for major in [2, 3] {
        promtool_check_config(major, &config).expect("promtool takes the list");
    }
}

/// What a sidecar serves once it has a list.
fn served(sidecar: &Sidecar, path: &str) -> String {
    let status = Status::start(sidecar);
    let deadline = Instant::now() + PATIENCE;
    while status.get("/-/ready").0 != 200 {
        assert!(Instant::now() < deadline, "it is not ready");
        thread::sleep(Duration::from_millis(50));
    }
    status.text(path)
}

#[test]
fn the_metrics_have_each_as_a_value_and_nothing_more() {
    let cloud = cloud();
    let sidecar = sidecar(&cloud).env("LISTEN_ADDRESS", "127.0.0.1:0");
    let text = served(&sidecar, "/metrics");
    let info: Vec<_> = text.lines().filter(|line| line.starts_with("balena_device_info{")).collect();
    assert_eq!(info.len(), corpus().len());
    let own = Regex::new(r"^(# (HELP|TYPE) )?(baletheus|balena_device|balena_fleet|process)_\w+[ {]").unwrap();
    for line in text.lines() {
        assert!(own.is_match(line), "{line:?}");
    }
    for (line, (_, read)) in info.iter().zip(corpus()) {
        let text = read.filter(|text| text.len() <= MAX_VALUE_SIZE).unwrap_or_default();
        let value = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        assert!(line.contains(&format!(",os_version=\"{value}\",")), "{line:?}");
        assert!(line.ends_with("} 1"), "{line:?}");
    }
    for major in [2, 3] {
        let mut command = Command::new(tools::prometheus(major).promtool);
        command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "promtool {major}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_page_shows_each_as_text() {
    let cloud = cloud();
    let page = served(&sidecar(&cloud).env("LISTEN_ADDRESS", "127.0.0.1:0"), "/");
    let names: Vec<String> =
        corpus().into_iter().filter_map(|(_, read)| read).filter(|text| text.contains('<')).collect();
    assert!(names.len() > 15);
    for name in names {
        assert!(!page.contains(&name), "{name:?} is markup");
    }
    for tag in ["<script", "<img", "<svg", "<iframe", "<base", "<marquee", "<bdo", "<!--", "<b>", "http-equiv"] {
        let found = page.to_lowercase().matches(tag).count();
        let is_own = tag == "http-equiv" && page.contains("&lt;meta http-equiv");
        assert!(found == 0 || is_own, "{tag} is in the page");
    }
    for tag in Regex::new("<[^>]*>").unwrap().find_iter(&page) {
        assert!(!tag.as_str().contains("evil") && !tag.as_str().contains("script:"), "{}", tag.as_str());
    }
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
}

/// A string of YAML and of PromQL alike, in ASCII.
fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|c| match c {
        ' '..='~' if !matches!(c, '"' | '\\') => c.to_string(),
        '\0'..='\u{ffff}' => format!("\\u{:04x}", u32::from(c)),
        _ => format!("\\U{:08x}", u32::from(c)),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

/// The text of an alert has the name as it is: no template of Prometheus reads it again.
#[test]
fn alerts_of_prometheus_have_each_as_text() {
    let names: Vec<_> = corpus()
        .into_iter()
        .filter_map(|(_, read)| read)
        .filter(|name| !name.is_empty() && name.len() <= MAX_VALUE_SIZE)
        .collect();
    let (mut series, mut expected) = (String::new(), String::new());
    for (id, name) in names.iter().enumerate() {
        let labels = format!("uuid=\"{}\", device_name={}, fleet=\"acme/lamps\"", uuid(id), quoted(name));
        let info = format!("balena_device_info{{job=\"baletheus\", instance=\"b:9797\", {labels}}}");
        let added = format!("scrape_series_added{{job=\"node\", instance=\"n\", uuid=\"{}\"}}", uuid(id));
        for (series_name, values) in [(info, "1x60"), (added, "2000x60")] {
            series += &format!("      - {{series: {}, values: {values}}}\n", quoted(&series_name));
        }
        let summary = format!("{name} (acme/lamps) began 60k series within an hour");
        expected += &format!(
            "          - exp_labels: {{severity: warning, scope: device, uuid: \"{}\", fleet: acme/lamps}}\n            \
             exp_annotations: {{summary: {}, description: \"One of its exporters has label values that change all the time, or it renames itself. Each series takes \
             memory of Prometheus.\", runbook_url: 'https://github.com/balena-io-playground/baletheus/blob/main/docs/alerts.md#serieschurn'}}\n",
            uuid(id),
            quoted(&summary.replace("60k", "120k")),
        );
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("alerts");
    let rules = ["records", "devices"].map(|name| root.join(format!("{name}.yml")).display().to_string());
    let test = format!(
        "rule_files: [{}]\ntests:\n  - interval: 1m\n    input_series:\n{series}    alert_rule_test:\n      - alertname: SeriesChurn\n        \
         eval_time: 59m\n        exp_alerts:\n{expected}",
        rules.join(", ")
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hostile.yml");
    fs::write(&file, test).unwrap();
    for major in [2, 3] {
        let output =
            Command::new(tools::prometheus(major).promtool).args(["test", "rules"]).arg(&file).output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(output.status.success(), "promtool {major}: {}", &text[..text.len().min(4000)]);
    }
}

/// The messages have one line for each of ten alerts, and one with the names of the others, without anything that a chat would make a
/// mention or a link of another text.
#[test]
fn messages_of_alertmanager_have_each_as_text() {
    let names: Vec<_> =
        corpus().into_iter().filter_map(|(_, read)| read).filter(|name| name.len() <= MAX_VALUE_SIZE).collect();
    let folder = tempfile::tempdir().unwrap();
    let templates = Path::new(env!("CARGO_MANIFEST_DIR")).join("alerts/alertmanager/messages.tmpl");
    for some in names.chunks(15) {
        let alert = |name: &String| {
            json!({
                "status": "firing",
                "labels": { "alertname": "DeviceDown", "severity": "warning", "fleet": "acme/lamps", "device_name": name },
                "annotations": { "summary": format!("{name} (acme/lamps) does not answer"), "runbook_url": "https://example.com" },
            })
        };
        let data = json!({
            "receiver": "people", "status": "firing", "externalURL": "http://localhost",
            "groupLabels": { "alertname": "DeviceDown" },
            "commonLabels": { "alertname": "DeviceDown", "severity": "warning", "fleet": "acme/lamps" },
            "commonAnnotations": { "runbook_url": "https://example.com" },
            "alerts": some.iter().map(alert).collect::<Vec<_>>(),
        });
        let file = folder.path().join("data.json");
        fs::write(&file, data.to_string()).unwrap();
        for template in ["baletheus.title", "baletheus.text", "baletheus.slack.title", "baletheus.slack.text"] {
            let mut command = Command::new(tools::alertmanager().with_file_name("amtool"));
            command.args(["template", "render", "--template.glob"]).arg(&templates).arg("--template.data").arg(&file);
            command.arg("--template.text").arg(format!("{{{{ template \"{template}\" . }}}}"));
            let output = command.output().unwrap();
            let text = String::from_utf8(output.stdout).expect("UTF-8");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            expect_harmless(&text);
            let lines = if template.ends_with("title") { 1 } else { some.len().min(11) + 1 };
            assert_eq!(text.trim_end_matches('\n').lines().count(), lines, "{template}: {text}");
            assert!(!text.contains("]("), "{template}: {text}");
            assert!(!template.contains("slack") || !text.contains(['<', '>']), "{template}: {text}");
        }
    }
}

/// In Grafana a link has the uuid of a device, which is hex, or the slug of its fleet, percent-encoded by Grafana, and never a name. No
/// panel shows a value as HTML.
#[test]
fn links_of_dashboards_take_no_name() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards");
    let variable = Regex::new(r"\$\{([^}]+)\}").unwrap();
    let known = [
        "datasource",
        "device",
        "fleet",
        "__url_time_range",
        "__data.fields.uuid",
        "__data.fields.fleet",
        "__field.labels.uuid",
        "__value.raw",
    ];
    let mut links = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let Ok(dashboard) = serde_json::from_str::<Value>(&text) else { continue };
        let mut all = vec![&dashboard];
        while let Some(value) = all.pop() {
            match value {
                Value::Array(items) => all.extend(items),
                Value::Object(fields) => {
                    all.extend(fields.values());
                    let url = fields.get("url").and_then(Value::as_str).filter(|url| !url.is_empty());
                    if let Some(url) = url {
                        links += 1;
                        let fixed =
                            ["/d/baletheus-", "https://dashboard.balena-cloud.com/devices/", "https://github.com/"];
                        assert!(fixed.iter().any(|start| url.starts_with(start)), "{}: {url}", path.display());
                        for found in variable.captures_iter(url) {
                            assert!(known.contains(&&found[1]), "{}: {url}", path.display());
                        }
                        let host = url.split(['?', '$']).next().unwrap_or_default();
                        assert!(!host.contains("{"), "{url}");
                    }
                    assert_ne!(fields.get("mode").and_then(Value::as_str), Some("html"), "{}", path.display());
                    assert_ne!(
                        fields.get("cellOptions").and_then(|cell| cell["type"].as_str()),
                        Some("markdown"),
                        "{}",
                        path.display()
                    );
                }
                _ => {}
            }
        }
    }
    assert!(links > 10, "{links} links");
}
