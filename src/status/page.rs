//! The page for people, in plain HTML without scripts: whether discovery works, and what it makes of each device.

use std::fmt::{Result, Write};
use std::time::{Duration, SystemTime};

use html_escape::encode_text;

use super::{Shown, Status};
use crate::device_state::listed_devices::{ListedDevice, ListedDevices};

/// The style sheet. A content security policy allows it by its place, `/style.css`.
pub const STYLE: &str = include_str!("style.css");
/// The most rows of a table: a larger page takes a browser seconds, and `baletheus check` finds a device by its name.
const MAX_ROWS: usize = 1000;
/// The state of the devices is old after three intervals, each of which counts as at least this long.
const MIN_STATE_AGE: Duration = Duration::from_secs(20);

/// The tables of devices, those with a problem first: id, title and the heading of the last column.
const TABLES: [(&str, &str, &str); 3] =
    [("left-out", "Left out", "Why"), ("offline", "Offline", "Targets"), ("devices", "Devices", "Targets")];

/// The rows of a table. Those beyond [`MAX_ROWS`] are only counted.
#[derive(Default)]
struct Table {
    rows: String,
    count: usize,
}

impl Status {
    pub(super) fn page(&self, shown: &Shown) -> String {
        let now = SystemTime::now();
        let mut tables = <[Table; 3]>::default();
        let mut devices = ListedDevices::new(shown.list.clone().unwrap_or_default(), shown.known.clone());
        while let Some(device) = devices.next() {
            let entry = device.entry;
            let table = match device.state.and_then(|state| state.online) {
                _ if entry.left_out.is_some() => &mut tables[0],
                Some(false) => &mut tables[1],
                _ => &mut tables[2],
            };
            table.count += 1;
            if table.count <= MAX_ROWS {
                let _ = self.write_row(&mut table.rows, &device, now); // into memory: cannot fail
            }
        }
        let mut page = String::new();
        let _ = self.write_head(&mut page, shown, now, tables.iter().map(|table| table.count).sum());
        for (table, (id, title, column)) in tables.iter().zip(TABLES) {
            let _ = table.write(&mut page, id, title, column);
        }
        page + "</main>\n</body>\n</html>\n"
    }

    fn write_head(&self, out: &mut String, shown: &Shown, now: SystemTime, devices: usize) -> Result {
        let state = match (shown.trouble(), self.liveness.late(), &shown.list) {
            (_, Some(_), _) => "stuck",
            (Some(_), _, _) => "failing",
            (None, None, None) => "starting",
            (None, None, Some(_)) => "well",
        };
        let class = if state == "well" { "good" } else { "bad" };
        let refreshed = shown.refreshed.map_or("never".into(), |time| ago(time, now));
        write!(
            out,
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>baletheus: {state}</title>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<link rel=\"icon\" href=\"data:,\">\n\
             <link rel=\"stylesheet\" href=\"/style.css\">\n</head>\n<body>\n<header>\n<h1>Baletheus</h1>\n\
             <p class=\"state\">State: <strong class=\"{class}\">{state}</strong>. Last successful refresh: {refreshed}. \
             Devices: {devices}. Targets: {}.</p>\n\
             <p class=\"soft\">This is the state of {}. <a href=\"/metrics\">Metrics</a>, \
             <a href=\"/targets\">targets as JSON</a>. Version {}.</p>\n</header>\n<main>\n",
            shown.targets(),
            humantime::format_rfc3339_seconds(now),
            env!("CARGO_PKG_VERSION")
        )?;
        let problems = self.problems(shown, now);
        if !problems.is_empty() {
            writeln!(out, "<div class=\"problems\" role=\"status\">")?;
            for problem in &problems {
                writeln!(out, "<p>{}</p>", encode_text(problem))?;
            }
            writeln!(out, "</div>")?;
        }
        Ok(())
    }

    fn problems(&self, shown: &Shown, now: SystemTime) -> Vec<String> {
        let mut problems = Vec::new();
        if let Some(late) = self.liveness.late() {
            problems.push(format!("Discovery hangs: it is {} late. Restart it and look at its log.", about(late)));
        }
        if let Some((what, why)) = shown.trouble() {
            problems.push(format!("{what}: {why}"));
        }
        match &shown.published {
            None if shown.stored.is_some() => problems.push(
                "There is no new list since the start: /targets has the list that the target file had then.".into(),
            ),
            None => problems.push("There is no list yet, and /targets answers 503.".into()),
            Some(list) if list.iter().all(|page| page.entries.is_empty()) => {
                problems.push("The API lists no device for this key and these options.".into());
            }
            Some(_) => {}
        }
        let age = now.duration_since(shown.known.states_read.unwrap_or(self.started)).unwrap_or_default();
        if age > 3 * self.settings.watch.interval.max(MIN_STATE_AGE) {
            let age = about(age);
            problems.push(format!("The state of the devices was read {age} ago for the last time: the log says why."));
        }
        problems
    }

    /// A device with its fleet, its state, and its targets or why it has none.
    fn write_row(&self, out: &mut String, device: &ListedDevice, now: SystemTime) -> Result {
        let (entry, state) = (device.entry, device.state);
        let name = format!("<bdi>{}</bdi>", encode_text(&entry.shown()));
        let is_plain = |uuid: &&str| uuid.bytes().all(|byte| byte.is_ascii_alphanumeric());
        match (&self.settings.dashboard, entry.uuid().filter(is_plain)) {
            (Some(url), Some(uuid)) => write!(out, "<tr><td><a href=\"{url}/devices/{uuid}/summary\">{name}</a>")?,
            _ => write!(out, "<tr><td>{name}")?,
        }
        let fleet = entry.common.fleet.as_ref().map(|fleet| &*fleet.slug).filter(|slug| !slug.is_empty());
        let (class, word) = match state.and_then(|state| state.online) {
            Some(true) => ("good", "online"),
            Some(false) => ("bad", "offline"),
            None => ("soft", "unknown"),
        };
        write!(
            out,
            " <small>{}</small><td><span class=\"{class}\">{word}</span>",
            encode_text(fleet.unwrap_or("no fleet"))
        )?;
        if let Some(since) = state.and_then(|state| state.since?.time()) {
            write!(out, " <small>since {}</small>", ago(since, now))?;
        }
        write_services(out, device)?;
        write!(out, "<td>")?;
        if let Some(left_out) = &entry.left_out {
            write!(out, "{}", encode_text(&left_out.to_string()))?;
        }
        let host = entry.host();
        for target in entry.targets() {
            let exporter = &target.exporter;
            let job = exporter.name.as_deref().unwrap_or("without a name");
            let service = exporter.service.as_deref().map(|service| format!("service {service}"));
            let origin = service.as_deref().unwrap_or(entry.common.origin.as_str());
            let url = format!("{host}:{}{}", exporter.port, exporter.path.as_deref().unwrap_or_default());
            let [job, origin, url] = [job, origin, &url].map(encode_text);
            write!(out, "<div>{job} <span class=\"soft\">from {origin}</span> <small>{url}</small></div>")?;
        }
        writeln!(out)
    }
}

/// What is wrong with its update and its services.
fn write_services(out: &mut String, device: &ListedDevice) -> Result {
    if let Some(state) = device.state.filter(|state| state.update_failed() == Some(true)) {
        let status = state.update.as_deref().unwrap_or_default();
        write!(out, "<div class=\"bad\">update {}</div>", encode_text(status))?;
    }
    let Some(services) = &device.services else { return Ok(()) };
    if !services.are_reported() {
        return write!(out, "<div class=\"soft\">services not reported</div>");
    }
    for install in services.of_running_release() {
        let service = encode_text(install.service.as_deref().unwrap_or("a service"));
        write!(out, "<div class=\"bad\">{service}: {}</div>", encode_text(&*install.status))?;
    }
    Ok(())
}

impl Table {
    fn write(&self, out: &mut String, id: &str, title: &str, column: &str) -> Result {
        if self.count == 0 {
            return Ok(());
        }
        write!(
            out,
            "<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title} <span class=\"soft\">({})</span></h2>\n<table>\n\
             <thead><tr><th scope=\"col\">Device<th scope=\"col\">In balenaCloud<th scope=\"col\">{column}</thead>\n<tbody>\n\
             {}</tbody>\n</table>\n",
            self.count, self.rows
        )?;
        if self.count > MAX_ROWS {
            let more = self.count - MAX_ROWS;
            writeln!(out, "<p>{more} more: <code>baletheus check NAME</code> explains a single device.</p>")?;
        }
        writeln!(out, "</section>")
    }
}

/// A moment by its distance from the present.
fn ago(time: SystemTime, now: SystemTime) -> String {
    let distance = now.duration_since(time).unwrap_or_default();
    let exact = humantime::format_rfc3339_seconds(time);
    format!("<time datetime=\"{exact}\" title=\"{exact}\">{} ago</time>", about(distance))
}

/// A duration in its largest unit.
fn about(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
