//! The example of docs/shards-openbalena.md: each device is on exactly one server, with all its exporters.

use crate::support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;
use std::thread;

use serde_json::Value;
use support::binary;
use support::cloud::Cloud;
use support::fleet::demo_fleet;
use support::prometheus::promtool_check_config;
use support::sidecar::Sidecar;
use support::tools;

const SHARDS: usize = 2;

/// The configuration of a member, with its number and the list of this sidecar.
fn example(shard: usize, list: &str) -> String {
    let document = include_str!("../../docs/shards-openbalena.md");
    let (_, block) = document.split_once("\n```yaml\n").expect("an example");
    let mut config = block.split("```").next().unwrap().to_owned();
    let number = format!("'{shard}'");
    for (from, to, times) in [("'0'", number.as_str(), 2), ("http://baletheus:9797/targets", list, 1)] {
        assert_eq!(config.matches(from).count(), times, "{from} in\n{config}");
        config = config.replace(from, to);
    }
    config
}

fn each_device_is_on_one_shard(major: u8) {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = Sidecar::of(binary::path(), &cloud)
        .env("LISTEN_ADDRESS", "127.0.0.1:0")
        // gw-oslo names a second exporter
        .env("OWN_TAGS", "all");
    let running = sidecar.start();
    let line = running.wait_for("status on http://");
    let list = format!("http://{}/targets", line.rsplit_once("http://").unwrap().1);
    running.wait_for("updated balena.json");

    let shards = (0..SHARDS).map(|shard| {
        let config = sidecar.path(format!("shard-{shard}.yml"));
        fs::write(&config, example(shard, &list)).unwrap();
        promtool_check_config(major, &config).expect("promtool accepts it");
        let mut promtool = Command::new(tools::prometheus(major).promtool);
        promtool.args(["check", "service-discovery", "--timeout=5s"]).arg(config).arg("balena");
        thread::spawn(move || promtool.output().unwrap())
    });
    // All of them at once, since each takes its time-out.
    let shards: Vec<_> = shards.collect();
    let (mut servers, mut kept) = (BTreeMap::<String, BTreeSet<usize>>::new(), 0);
    for (shard, output) in shards.into_iter().enumerate() {
        let output = output.join().unwrap();
        let found = serde_json::from_slice::<Vec<Value>>(&output.stdout);
        let found = found.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
        assert_eq!(found.len(), 25, "{found:#?}");
        for target in found.iter().filter(|target| target["labels"]["uuid"].is_string()) {
            servers.entry(target["labels"]["uuid"].as_str().unwrap().to_owned()).or_default().insert(shard);
            kept += 1;
        }
    }
    assert_eq!((servers.len(), kept), (24, 25), "{servers:#?}");
    assert!(servers.values().all(|shards| shards.len() == 1), "{servers:#?}");
    let used: BTreeSet<_> = servers.values().flatten().collect();
    assert_eq!(used.len(), SHARDS, "{servers:#?}");
}

#[test]
fn with_prometheus_2_each_device_is_on_one_shard() {
    each_device_is_on_one_shard(2);
}

#[test]
fn with_prometheus_3_each_device_is_on_one_shard() {
    each_device_is_on_one_shard(3);
}
