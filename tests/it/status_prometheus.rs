//! The real Prometheus, 2 and 3, takes what the status endpoint tells: metrics, and the list as http_sd.

use std::collections::BTreeSet;
use std::fs;

use crate::support::binary::sidecar;
use crate::support::cloud::Cloud;
use crate::support::fleet::{demo_fleet, find};
use crate::support::prometheus::Prometheus;
use crate::support::sidecar::PATIENCE;
use serde_json::Value;

fn scrape(major: u8) {
    let cloud = Cloud::start(demo_fleet());
    let sidecar = sidecar(&cloud)
        .env("LISTEN_ADDRESS", "127.0.0.1:0")
        .env("DEVICE_REFRESH_RATE", "1s")
        .env("DEVICE_METRICS", "true")
        // targets that nothing of this test reaches
        .env("TARGET_ADDRESS", "public")
        .env("PUBLIC_URL_DOMAIN", "devices.invalid")
        // gw-oslo names a second exporter
        .env("OWN_TAGS", "all");
    let running = sidecar.start();
    let line = running.wait_for("status on http://");
    let address = line.rsplit_once("http://").unwrap().1;
    let config = sidecar.path("prometheus.yml");
    fs::write(
        &config,
        format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\nscrape_configs:\n\
             - {{job_name: baletheus, static_configs: [{{targets: ['{address}']}}]}}\n\
             - {{job_name: file, file_sd_configs: [{{files: [balena.json]}}]}}\n\
             - {{job_name: http, http_sd_configs: [{{url: 'http://{address}/targets', refresh_interval: 1s}}]}}\n"
        ),
    )
    .unwrap();
    running.wait_for("updated balena.json");
    let prometheus = Prometheus::start(major, &config);

    // http_sd gives the same targets as the file.
    let targets = |job: &str| -> BTreeSet<String> {
        let active = prometheus.active_targets();
        let of_job = active.iter().filter(|target| target["scrapePool"] == job);
        let plain = |target: &Value| {
            let mut labels = target["discoveredLabels"].as_object().unwrap().clone();
            labels.retain(|name, _| !["__meta_filepath", "__meta_url", "job"].contains(&name.as_str()));
            Value::Object(labels).to_string()
        };
        of_job.map(plain).collect()
    };
    prometheus.wait_until("the same targets by file and by http", PATIENCE, |_| {
        let (file, http) = (targets("file"), targets("http"));
        (file.len() == 20 && file == http).then_some(())
    });

    // Every metric has samples, and every device is there.
    let count = |query: &str| {
        let found = prometheus.query(query);
        found.first().map_or(0.0, |(_, value)| value.parse::<f64>().unwrap())
    };
    prometheus.wait_until("vitals", PATIENCE, |_| (count("count(balena_device_online)") == 25.0).then_some(()));
    for (query, expected) in [
        ("up{job='baletheus'}", 1.0),
        ("count(balena_device_info)", 25.0),
        ("sum(balena_device_online)", 22.0),
        ("count(balena_device_heartbeat_state{state='offline'} == 1)", 3.0),
        ("sum(balena_device_update_pending)", 3.0),
        ("count(balena_device_memory_used_bytes / balena_device_memory_size_bytes < 0.3)", 25.0),
        ("count(balena_device_storage_used_bytes / balena_device_storage_size_bytes < 0.3)", 25.0),
        ("avg(balena_device_cpu_usage_ratio)", 0.07),
        ("max(balena_device_cpu_temperature_celsius)", 51.0),
        ("sum(balena_device_undervolted)", 0.0),
        ("count(balena_device_last_connectivity_event_timestamp_seconds < time())", 25.0),
        ("baletheus_devices", 25.0),
        ("baletheus_targets", 20.0),
        // five without a public URL, one that a tag switches off; of the other 19 one has two exporters
        ("sum(baletheus_devices_left_out)", 6.0),
        ("baletheus_file_writes_total", 1.0),
        ("count(baletheus_build_info)", 1.0),
        ("sum(baletheus_refresh_duration_seconds_bucket{le='+Inf'} - ignoring (le) baletheus_refreshes_total)", 0.0),
        // the recipes of the README
        ("count(balena_device_online * on (uuid) group_left (device_name, fleet) balena_device_info == 0)", 3.0),
        // one device's exporters have names, which are their jobs
        ("count(up{job='file'} * on (uuid) group_left (release) balena_device_info)", 18.0),
    ] {
        let what = format!("{query} to be {expected}");
        prometheus.wait_until(&what, PATIENCE, |_| ((count(query) - expected).abs() < 1e-9).then_some(()));
    }

    let gone = cloud.change(|devices| find(devices, "fridge-01")["uuid"].as_str().unwrap().to_owned());
    cloud.change(|devices| devices.retain(|device| device["uuid"] != *gone));
    prometheus.wait_until("its series to go with the device", PATIENCE, |prometheus| {
        prometheus.query(&format!("{{__name__=~'balena_device_.*',uuid='{gone}'}}")).is_empty().then_some(())
    });
    prometheus.wait_until("its target to go by http as by file", PATIENCE, |_| {
        (targets("http").len() == 19 && targets("http") == targets("file")).then_some(())
    });
}

#[test]
fn prometheus_2_takes_metrics_and_targets() {
    scrape(2);
}

#[test]
fn prometheus_3_takes_metrics_and_targets() {
    scrape(3);
}
