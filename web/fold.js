// Folds advanced widgets away where the page knows the flag but does not act on it; later versions do so themselves.
import { app } from "../../scripts/app.js"

app.registerExtension({
  name: "SeqLoRA.fold",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("SeqLoRA")) return
    const folded = (node.widgets ?? []).filter(widget => widget.options?.advanced && !widget.advanced)
    for (const widget of folded) {
      widget.advanced = true
      // a hidden widget keeps its height in the layout, unless it says that it has none
      widget.computeSize = width => (node.showAdvanced ? [width, LiteGraph.NODE_WIDGET_HEIGHT] : [width, -4])
    }
    if (folded.length) node.setSize(node.computeSize())
  },
})
