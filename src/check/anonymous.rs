//! The report for an issue: what happened, without names, uuids, addresses and keys.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::Settings;
use super::report::{Row, TargetResult};
use crate::balena::{BALENA_CLOUD, Failure};
use crate::text::count;

/// The options that explain a result. Fleets, tags and host names are only counted.
pub fn options(settings: &Settings) -> String {
    let is_cloud = settings.api.url == BALENA_CLOUD;
    let (selection, rules) = (&settings.selection, &settings.rules);
    format!(
        "baletheus {} on {} {}\nAPI: {}, time-out {} s, proxy: {}\nselection: {}, {}, online only: {}\n\
         targets: address {}, {} by option, service labels: {}, own tags: {}\n",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        std::env::consts::ARCH,
        if is_cloud { "balenaCloud" } else { "not balenaCloud's" },
        settings.api.timeout.as_secs(),
        yes(settings.api.proxy().is_some()),
        count(selection.fleets.len(), "fleet"),
        count(selection.tags.len(), "tag"),
        yes(rules.online_only),
        rules.address.as_str(),
        count(rules.exporters.len(), "exporter"),
        yes(rules.service_labels),
        rules.own_tags.as_str(),
    )
}

/// The report of a refresh that failed.
pub fn failed(options: &str, failure: &Failure) -> String {
    let status = failure.status.map_or("none".into(), |status| status.to_string());
    format!("{options}refresh: failed, reason {}, HTTP status {status}\n", failure.reason.as_str())
}

/// The report of all targets.
pub fn report(options: &str, refresh: Duration, rows: &[Row]) -> String {
    let (mut devices, mut fleets) = (BTreeMap::new(), BTreeMap::new());
    let mut results = BTreeMap::<_, usize>::new();
    let mut lines = String::new();
    for row in rows {
        let device = format!("device-{}", number(&mut devices, row.uuid.as_deref().unwrap_or(&row.device)));
        let fleet = row.fleet.as_deref().map_or("-".into(), |fleet| format!("fleet-{}", number(&mut fleets, fleet)));
        let url = row.url.as_deref().and_then(|url| reqwest::Url::parse(url).ok());
        let target = url
            .map_or("-".into(), |url| format!("{}:{}", url.scheme(), url.port_or_known_default().unwrap_or_default()));
        let status = row.status.map_or("-".into(), |status| status.to_string());
        let seconds = row.seconds.map_or("-".into(), |seconds| format!("{seconds:.2}"));
        let samples = row.samples.map_or("-".into(), |samples| samples.to_string());
        let (result, reason) = (row.result.as_str(), row.reason.unwrap_or("-"));
        *results.entry((result, reason)).or_default() += 1;
        let state = row.online.map_or("unknown", |online| if online { "online" } else { "offline" });
        let origin = row.origin.unwrap_or("-");
        let cells = [&device, &fleet, state, &target, origin, result, reason, &status, &samples, &seconds];
        let _ = writeln!(lines, "| {} |", cells.join(" | ")); // into memory: cannot fail
    }
    let result = |((result, reason), count): (&(_, _), _)| match *reason {
        "-" => format!("{count} {result}"),
        reason => format!("{count} {result} ({reason})"),
    };
    let results: Vec<_> = results.iter().map(result).collect();
    let mut seconds: Vec<_> = rows.iter().filter_map(|row| row.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let time = seconds.get(seconds.len() / 2).zip(seconds.last());
    let time = time.map_or("none".into(), |(median, longest)| format!("{median:.2} s median, {longest:.2} s longest"));
    let offline = rows.iter().filter(|row| row.result == TargetResult::Offline).count();
    format!(
        "{options}refresh: {:.2} s, {}, {}\nresults: {}; {offline} of the targets are of offline devices\n\
         answers: {time}\n\n| device | fleet | state | target | from | result | reason | status | samples | seconds |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n{lines}",
        refresh.as_secs_f64(),
        count(devices.len(), "device"),
        count(fleets.len(), "fleet"),
        results.join(", "),
    )
}

/// The number that stands for a name, from 1.
fn number<'a>(names: &mut BTreeMap<&'a str, usize>, name: &'a str) -> usize {
    let next = names.len() + 1;
    *names.entry(name).or_insert(next)
}

fn yes(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "no" }
}
