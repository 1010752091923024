// Connects the layer explorer to the traits of an anywidget (vlmbench.lab.explorer).
export default {
  render({ model, el }) {
    const put = (name, value) => {
      model.set(name, value);
      model.save_changes();
    };
    const view = mountExplorer(el, model.get('data'), {
      region: layers => put('region', layers),
      recipe: name => put('recipe', name),
      scale: name => put('scale', name),
      start: () => model.send({ start: true }),
    });
    const told = ['region', 'recipe', 'scale', 'variant', 'cost', 'note', 'started'];
    for (const name of told) {
      const show = () => view.tell(name, model.get(name));
      model.on(`change:${name}`, show);
      show();
    }
    return () => view.close();
  },
};
