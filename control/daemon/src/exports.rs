//! The exports of NBD servers that volumes use: one export is the storage node of one volume.
//!
//! Every volume counts that this control module knows, attached or not, and those that are being made. Addresses are compared as
//! they are written. Two spellings may mean one export (a name and a number of one host, a link to one socket): then the
//! identity in its superblock decides, when a core formats or opens it.

use everdisk_proto::volume::{NodeUrl, VolumeSpec};

use crate::error::{Error, Result};

/// Refuses a new volume of which a storage node is an export that one of `others` uses.
///
/// # Errors
/// Which export, and whose it is.
pub fn refuse(spec: &VolumeSpec, others: &[VolumeSpec]) -> Result<()> {
    let exports =
        |spec: &VolumeSpec| spec.nodes.iter().map(|node| node.url.clone()).filter(is_export).collect::<Vec<_>>();
    for url in exports(spec) {
        if let Some(other) = others.iter().find(|other| exports(other).contains(&url)) {
            return Err(Error::State(format!(
                "{url}: it is a storage node of volume {0} already; choose another export, or `everdisk volume delete {0}` first",
                other.name
            )));
        }
    }
    Ok(())
}

const fn is_export(url: &NodeUrl) -> bool {
    matches!(url, NodeUrl::Nbd(_))
}

#[cfg(test)]
mod tests {
    use everdisk_proto::volume::NodeSpec;
    use uuid::Uuid;

    use super::*;

    fn spec(name: &str, urls: &[&str]) -> VolumeSpec {
        let node = |url: &&str| NodeSpec { url: url.parse().unwrap(), uuid: Uuid::new_v4() };
        let golden = include_str!("../../../proto/golden/volume-v2.json");
        let golden: VolumeSpec = serde_json::from_str(golden).unwrap();
        VolumeSpec { name: name.parse().unwrap(), nodes: urls.iter().map(node).collect(), ..golden }
    }

    #[test]
    fn g_an_export_is_the_storage_node_of_one_volume() {
        let others = [spec("a", &["nbd://host/x", "dir:/srv/a"]), spec("b", &["nbd+unix:///y?socket=/run/s"])];
        let refused = |urls: &[&str]| refuse(&spec("v", urls), &others).unwrap_err().to_string();
        let said = refused(&["nbd://host/z", "nbd://host:10809/x"]);
        assert!(said.contains("nbd://host/x") && said.contains("volume a already"), "{said}");
        assert!(refused(&["nbd+unix:///y?socket=/run/s"]).contains("volume b already"));
        let free = ["nbd://host/z", "nbd://host:10810/x", "nbd+unix:///y?socket=/run/t", "dir:/srv/a"];
        refuse(&spec("v", &free), &others).unwrap();
    }
}
