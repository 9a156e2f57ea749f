//! `examples/demo/docker-compose.yml` as a newcomer starts it: the panels of *Fleet overview* have data. `scripts/check/stack demo` builds
//! the images and takes all of it away again.

pub mod support {
    pub mod grafana;
}

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::blocking::Client;
use serde_json::Value;
use support::grafana::{dashboards, interpolate, list, text};

/// Against a hang only.
const PATIENCE: Duration = Duration::from_secs(600);

/// The first answer of Prometheus that has a series.
fn ask(client: &Client, query: &str) -> Option<Vec<Value>> {
    let url = Url::parse_with_params("http://127.0.0.1:9090/api/v1/query", [("query", query)]).unwrap();
    let answer: Value = serde_json::from_str(&client.get(url).send().ok()?.text().ok()?).ok()?;
    let series = answer["data"]["result"].as_array()?;
    (!series.is_empty()).then(|| series.clone())
}

#[test]
#[ignore = "needs Docker: scripts/check/stack demo"]
fn the_demo_shows_a_fleet() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let compose = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/docker_compose/docker-compose");
    let start = Instant::now();
    let compose = |arguments: &[&str]| {
        let mut command = Command::new(&compose);
        command.args(["--file", "examples/demo/docker-compose.yml"]).args(arguments);
        command
    };
    let up = compose(&["up", "--detach"]).status();
    assert!(up.expect("scripts/check/stack demo gets docker-compose").success());
    let client = Client::new();
    let dashboards = dashboards();
    let overview = dashboards.iter().find(|dashboard| dashboard.uid() == "baletheus-fleet").expect("Fleet overview");
    let variables = overview.variables().iter().map(|variable| {
        let value = match text(variable, "name") {
            "rows" => "200",
            "by" => "release",
            "tag" => "site",
            _ => ".*",
        };
        (text(variable, "name").to_owned(), value.to_owned())
    });
    let mut variables: BTreeMap<_, _> = variables.collect();
    variables.extend(["__rate_interval", "__interval"].map(|name| (name.to_owned(), "6m".to_owned())));
    let panels = overview.panels().into_iter().filter(|panel| text(panel, "type") == "stat");
    let mut waiting: Vec<_> = panels.collect();
    assert!(waiting.len() > 6, "{} panels", waiting.len());
    let has_data = |target: &Value| ask(&client, &interpolate(text(target, "expr"), &variables)).is_some();
    while !waiting.is_empty() {
        // Of several queries of a panel, each is for another state.
        waiting.retain(|panel| !list(panel, "/targets").iter().any(has_data));
        let titles: Vec<_> = waiting.iter().map(|panel| text(panel, "title")).collect();
        assert!(start.elapsed() < PATIENCE, "no data in {titles:?}");
        thread::sleep(Duration::from_secs(1));
    }
    let online = ask(&client, "count(balena_device_online)").expect("devices");
    // One comes and goes.
    assert!(["25", "26"].map(Value::from).contains(&online[0]["value"][1]), "{online:?}");
    while ask(&client, "count(up{uuid!=''} == 1) > 10").is_none() {
        assert!(start.elapsed() < PATIENCE, "no exporter of a device answers");
        thread::sleep(Duration::from_secs(1));
    }
    let check = compose(&["exec", "-T", "baletheus", "/baletheus", "check", "--failing"]).output().unwrap();
    let table = String::from_utf8_lossy(&check.stdout);
    assert!(
        table.contains("freezer-01") && table.contains(" 1 fail, "),
        "{table}{}",
        String::from_utf8_lossy(&check.stderr)
    );
    println!("every figure of Fleet overview had data {} s after the start", start.elapsed().as_secs());
}
