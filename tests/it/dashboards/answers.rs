//! What Grafana asks and offers, from the real Prometheus.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use regex::Regex;
use reqwest::Url;
use serde_json::{Value, json};

use super::stack::Stack;
use crate::support::grafana::{Dashboard, interpolate, list, text};

impl Stack {
    /// The labels of all series that have a number in them, now or since the start.
    pub fn ask(&self, query: &str, instant: bool) -> Vec<BTreeMap<String, String>> {
        self.ask_values(query, instant).into_iter().map(|(labels, _)| labels).collect()
    }

    /// The same, with the last number of each.
    pub fn ask_values(&self, query: &str, instant: bool) -> Vec<(BTreeMap<String, String>, String)> {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).expect("a time").as_secs().to_string();
        let path = if instant { "query" } else { "query_range" };
        let mut parameters = vec![("query", query.to_owned())];
        if !instant {
            let (start, end) = (seconds(self.start), seconds(SystemTime::now()));
            parameters.extend([("start", start), ("end", end), ("step", "2".to_owned())]);
        }
        let url = Url::parse_with_params(&format!("http://prometheus/{path}"), &parameters).expect("a URL");
        let answer = self.prometheus.api(&url.as_str()["http://prometheus/".len()..]);
        let number = |sample: &Value| {
            let value = sample[1].as_str()?;
            value.parse::<f64>().is_ok_and(f64::is_finite).then(|| value.to_owned())
        };
        let last =
            |series: &Value| number(&series["value"]).or(list(series, "/values").iter().filter_map(number).next_back());
        let labels = |series: &Value| {
            let labels = series["metric"].as_object().expect("labels").iter();
            labels.map(|(name, value)| (name.clone(), value.as_str().expect("text").to_owned())).collect()
        };
        list(&answer, "/result").iter().filter_map(|series| Some((labels(series), last(series)?))).collect()
    }

    /// What Grafana would offer for a variable.
    pub fn values_of(&self, variable: &Value, known: &BTreeMap<String, String>) -> Vec<String> {
        if variable["type"] == "datasource" {
            return vec!["of-this-test".to_owned()];
        }
        if ["custom", "textbox"].contains(&text(variable, "type")) {
            return list(variable, "/options").iter().map(|option| text(option, "value").to_owned()).collect();
        }
        let query = interpolate(text(&variable["query"], "query"), known);
        if let Some(query) = query.strip_prefix("query_result(").and_then(|query| query.strip_suffix(')')) {
            let regex = text(variable, "regex").strip_prefix('/').and_then(|regex| regex.strip_suffix('/'));
            let regex = Regex::new(regex.expect("/…/")).expect("a regular expression");
            let lines = self.ask(query, true).into_iter().map(|labels| {
                let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
                format!("{{{}}} 1 1", labels.join(","))
            });
            return lines.filter_map(|line| Some(regex.captures(&line)?["value"].to_owned())).collect();
        }
        let inner = query.strip_prefix("label_values(").and_then(|query| query.strip_suffix(')'));
        let (selector, label) = inner.and_then(|inner| inner.rsplit_once(',')).expect("label_values(selector, label)");
        let path = format!("http://prometheus/label/{}/values", label.trim());
        let url = Url::parse_with_params(&path, [("match[]", selector)]).expect("a URL");
        let answer = self.prometheus.api(&url.as_str()["http://prometheus/".len()..]);
        list(&json!({ "all": answer }), "/all").iter().map(|value| value.as_str().expect("text").to_owned()).collect()
    }

    /// Values for all variables, with one device where one is chosen. What a custom variable offers is tried one by one.
    pub fn choices(&self, dashboard: &Dashboard, device: &str) -> Vec<BTreeMap<String, String>> {
        let own = [("__rate_interval", "20s")];
        let mut all = vec![BTreeMap::from(own.map(|(name, value)| (name.to_owned(), value.to_owned())))];
        for variable in dashboard.variables() {
            let name = text(variable, "name");
            let found = self.values_of(variable, &all[0]);
            let mut chosen = match name {
                _ if variable["type"] == "custom" => found,
                "device" => found.into_iter().filter(|uuid| uuid == device).collect(),
                _ if variable["includeAll"] == true => vec![text(variable, "allValue").to_owned()],
                _ => found.into_iter().take(1).collect(),
            };
            if chosen.is_empty() && device.is_empty() {
                chosen.push(String::new()); // as Grafana does
            }
            if chosen.is_empty() {
                return Vec::new();
            }
            let rest = chosen.split_off(1);
            let more: Vec<_> = rest.into_iter().map(|value| with(&all[0], name, value)).collect();
            all = all.into_iter().map(|values| with(&values, name, chosen[0].clone())).chain(more).collect();
        }
        all
    }
}

fn with(values: &BTreeMap<String, String>, name: &str, value: String) -> BTreeMap<String, String> {
    values.clone().into_iter().chain([(name.to_owned(), value)]).collect()
}
