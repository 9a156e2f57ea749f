//! The report of `check`: a table for people or JSON for programs, with a hint for each reason.

use std::fmt::Write as _;

use serde::Serialize;

use crate::check::probe::Answer;
use crate::discovery::left_out::{LeftOut, LeftOutReason};
use crate::net::connector::is_untrusted;
use crate::net::scrape_error::{ScrapeError, ScrapeReason};
use crate::net::vpn::unreachable_hint;
use crate::text::{count, printable, printable_json};

/// The widest column of the table: a single longer cell does not widen its column.
const MAX_WIDTH: usize = 80;
/// Characters that the table shows of a name.
const MAX_NAME_WIDTH: usize = 60;

/// A target, or a device without one. These are the fields of `--json`.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    /// The device's name and the beginning of its uuid.
    pub device: String,
    pub uuid: Option<String>,
    pub fleet: Option<String>,
    /// The name of the exporter.
    pub job: Option<String>,
    /// The service whose labels declare the exporter.
    pub service: Option<String>,
    /// Where the exporter comes from.
    pub origin: Option<&'static str>,
    /// The URL that is scraped; none if the device is left out.
    pub url: Option<String>,
    /// Whether balenaCloud sees the device.
    pub online: Option<bool>,
    /// The device's services that do not run; none if the device does not report them, is offline, or the key may not read them.
    pub services_not_running: Option<Vec<Stopped>>,
    pub result: Outcome,
    pub samples: Option<u64>,
    pub seconds: Option<f64>,
    /// The word for why it is left out or does not answer.
    pub reason: Option<&'static str>,
    /// The HTTP status that refused, of the VPN proxy or of the exporter.
    pub status: Option<u16>,
    /// The result, for people.
    pub answer: String,
    /// What to do; empty if the target answers as it should.
    pub hint: &'static str,
}

/// A service that does not run, with its status in the API's words.
#[derive(Debug, Serialize)]
pub struct Stopped {
    pub service: Option<String>,
    pub status: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    #[default]
    LeftOut,
    Answers,
    /// The target does not answer and balenaCloud sees the device offline, which is no failure.
    Offline,
    Fails,
}

impl Row {
    /// The row of a device that is left out.
    pub fn left_out(self, left_out: &LeftOut) -> Self {
        let answer = format!("left out: {left_out}");
        Row { reason: Some(left_out.reason.as_str()), answer, hint: left_out_hint(left_out.reason), ..self }
    }

    /// Takes the result of a probe.
    pub fn answered(&mut self, answer: Result<Answer, ScrapeError>) {
        match answer {
            Ok(answer) => {
                let seconds = answer.duration.as_secs_f64();
                self.result = Outcome::Answers;
                self.samples = Some(answer.samples);
                self.seconds = Some(seconds);
                let s = if answer.samples == 1 { "" } else { "s" };
                self.hint = if answer.outdated { OUTDATED_HINT } else { "" };
                self.answer = format!("{} sample{s} in {seconds:.2} s", thousands(answer.samples));
            }
            Err(refused) => {
                let offline = self.online == Some(false);
                self.result = if offline { Outcome::Offline } else { Outcome::Fails };
                self.reason = Some(refused.reason.as_str());
                self.status = refused.status;
                self.hint = if offline { OFFLINE_HINT } else { hint(&refused) };
                // these have their status in the message
                let status =
                    refused.status.filter(|_| !matches!(refused.reason, ScrapeReason::Http | ScrapeReason::Proxy));
                self.answer = refused.message + &status.map_or_else(String::new, |status| format!(" ({status})"));
            }
        }
    }

    /// Whether the target should answer and does not.
    pub fn fails(&self) -> bool {
        self.result == Outcome::Fails
    }
}

const NO_EXPORTER_HINT: &str = "declare it with the label prometheus.io.port of a service in the fleet's docker-compose.yml, or \
    set --exporter (EXPORTERS=node:80 for the example of version 0.1)";
const OFFLINE_HINT: &str = "it is offline, which is no failure here: is it switched on, and on the net?";

const OUTDATED_HINT: &str =
    "this node_exporter is older than 0.16, and the dashboards do not know its names, such as node_cpu: update it";

/// What to do about a device that is left out.
fn left_out_hint(reason: LeftOutReason) -> &'static str {
    match reason {
        LeftOutReason::NotTagged => "change its tag, or --tag (DEVICE_TAG)",
        LeftOutReason::SwitchedOff => "remove the tag, or set it to true",
        LeftOutReason::Offline | LeftOutReason::LanAddressTaken => OFFLINE_HINT,
        LeftOutReason::NoPublicUrl => {
            "switch on its public device URL in balenaCloud's dashboard, or use --address vpn"
        }
        LeftOutReason::NoLanAddress => "does its supervisor run? --address vpn needs no address",
        LeftOutReason::LanAddressRefused => {
            "if devices are in that network, name it with --lan-network (LAN_NETWORKS), or use --address vpn"
        }
        LeftOutReason::NoExporter => NO_EXPORTER_HINT,
        LeftOutReason::Broken | LeftOutReason::NoId | LeftOutReason::BadUuid => {
            "the API's record of it is odd: please report it"
        }
    }
}

/// What to do about a target that does not answer.
fn hint(refused: &ScrapeError) -> &'static str {
    match refused.reason {
        ScrapeReason::NoTunnel | ScrapeReason::BadTunnel => unreachable_hint(refused),
        ScrapeReason::NoAccess => "try again in a minute; then see whether the key may reach this device",
        ScrapeReason::NotConnected => "restart it, or wait: it has lost balena's VPN",
        ScrapeReason::PortClosed | ScrapeReason::ConnectionRefused => {
            "does the exporter run, on this port (--exporter), with host network or the port published?"
        }
        ScrapeReason::NoDevice => "is --tunnel-url (TUNNEL_URL) the proxy of this balena?",
        ScrapeReason::NoSuchHost => "is --public-domain (PUBLIC_URL_DOMAIN) right, and DNS here?",
        ScrapeReason::NoRoute => "is this machine in the device's network? --address vpn works from anywhere",
        ScrapeReason::NoConnection => "try again: it is this machine or its network that fails",
        ScrapeReason::Timeout => "is the device alive? does its exporter hang, or a firewall drop packets?",
        ScrapeReason::Tls if is_untrusted(&refused.message) => {
            "is the clock here right? An exporter with its own certificate needs --ca-file (CA_FILE) here, and tls_config \
             with ca_file or insecure_skip_verify in Prometheus"
        }
        ScrapeReason::Tls => "does the exporter speak https on this port? Its scheme (prometheus.io/scheme) says so",
        ScrapeReason::Proxy => "does the proxy allow it? NO_PROXY excludes a host from it",
        ScrapeReason::Http if refused.status == Some(401) => {
            "it wants a password or a token: give it to Prometheus (basic_auth or authorization), or let it allow /metrics"
        }
        ScrapeReason::Http if matches!(refused.status, Some(400 | 403 | 421)) => {
            "does it want a password or a token, or allow only some hosts? Its list needs the host and port of this \
             address, <uuid>.balena:<port> through the tunnel"
        }
        ScrapeReason::Http if refused.status.is_some_and(|status| status >= 500) => {
            "the exporter's own log may tell more"
        }
        ScrapeReason::Http | ScrapeReason::NotMetrics => {
            "is the path right (--exporter NAME:PORT/PATH)? is it the exporter that listens there?"
        }
        ScrapeReason::Redirect => "name the port and path that answer (--exporter NAME:PORT/PATH)",
        ScrapeReason::NotTarget => "name another port (--exporter): a scrape does not go there",
        ScrapeReason::NotHttp => "does it want https (tag prometheus.io/scheme)? is it the exporter's port?",
        ScrapeReason::BrokeOff | ScrapeReason::TooLarge => "the exporter's own log may tell more",
        ScrapeReason::Busy | ScrapeReason::BadRequest => "try again in a minute",
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let comma = |index: usize| if index > 0 && (digits.len() - index).is_multiple_of(3) { "," } else { "" };
    digits.chars().enumerate().fold(String::new(), |text, (index, digit)| format!("{text}{}{digit}", comma(index)))
}

/// The report as a JSON array, with one object on each line.
pub fn json(rows: &[Row]) -> String {
    let lines: Vec<_> =
        rows.iter().filter_map(|row| serde_json::to_string(row).ok()).map(|row| printable_json(&row)).collect();
    format!("[{}\n]\n", lines.iter().map(|line| format!("\n{line}")).collect::<Vec<_>>().join(","))
}

/// The columns of the table.
const HEADS: [&str; 8] = ["DEVICE", "FLEET", "EXPORTER", "FROM", "ADDRESS", "STATE", "ANSWER", "WHAT TO DO"];

/// The cells of a row.
fn cells(row: &Row) -> [String; 8] {
    let shown = |text: Option<&str>| text.map_or_else(|| "-".to_owned(), printable);
    let online = match row.online {
        Some(true) => "online",
        Some(false) => "offline",
        None => "unknown",
    };
    // shortened where that is unambiguous
    let url = shown(row.url.as_deref());
    let url = url.strip_prefix("http://").unwrap_or(&url);
    let url = url.strip_suffix("/metrics").filter(|host| !host.contains('/')).unwrap_or(url);
    let from = match &row.service {
        Some(service) => format!("service {}", printable(service)),
        None => shown(row.origin),
    };
    let [device, answer] = [&row.device, &row.answer].map(|text| printable(text));
    let (fleet, job) = (shown(row.fleet.as_deref()), shown(row.job.as_deref()));
    // A device chooses its name, and an exporter its answer: two columns are never beside each other in one cell.
    let [device, fleet, job, from, answer] =
        [device, fleet, job, from, answer].map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
    let cut = |text: String| {
        let letters: Vec<_> = text.chars().collect();
        if letters.len() <= MAX_NAME_WIDTH {
            return text;
        }
        // The end of a device is its short uuid, which tells it from others.
        let (start, end) = (&letters[..MAX_NAME_WIDTH - 11], &letters[letters.len() - 10..]);
        start.iter().chain(&['…']).chain(end).collect()
    };
    [cut(device), cut(fleet), cut(job), cut(from), url.to_owned(), online.into(), answer, row.hint.into()]
}

/// The report as a table.
pub fn table(rows: &[Row]) -> String {
    let lines: Vec<_> = [HEADS.map(str::to_owned)].into_iter().chain(rows.iter().map(cells)).collect();
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.filter(|width| *width <= MAX_WIDTH).max().unwrap_or_default()
    };
    let widths: [usize; HEADS.len() - 1] = std::array::from_fn(width);
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  "));
        let _ = writeln!(text, "{}", (cells.collect::<String>() + &line[HEADS.len() - 1]).trim_end());
    }
    let of = |outcome| rows.iter().filter(|row| row.result == outcome).count();
    let [left_out, answer, offline, fail] =
        [Outcome::LeftOut, Outcome::Answers, Outcome::Offline, Outcome::Fails].map(of);
    let targets = count(answer + offline + fail, "target");
    let left_out = count(left_out, "device");
    let _ = writeln!(text, "\n{targets}: {answer} answer, {fail} fail, {offline} offline; {left_out} left out");
    text
}
